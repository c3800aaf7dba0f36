//! The soak: processes of every kind at work while they, the coordinator and its keeper are killed, stopped, forked and
//! replaced at random; and what deaths cost (SPEC §3, §4). `cargo test` runs a short form; the long ones:
//!
//! | variable | meaning | short | promised |
//! |---|---|---|---|
//! | `SHMBUS_SOAK_SECONDS` | length of the random schedule | 5 | – |
//! | `SHMBUS_SOAK_KILLS` | kills for each recovery time; from 1,000 on p99 ≤ 10 ms is demanded | 30 | 1,000 |
//! | `SHMBUS_SOAK_CYCLES` | processes that join and are killed | 1,000 | 100,000 |
//! | `SHMBUS_SOAK_PAIRS` | pairs of chunks with and without coordinator; unset: not run | – | 20 |
//!
//! `SHMBUS_TEST_SEED` repeats the random choices. Times and ratios mean something in a release build, on a quiet machine, and one
//! test at a time, which the tests see to among themselves. A failed schedule prints its faults; the history has every process's.

mod checker;
#[path = "../common/mod.rs"]
mod common;
mod history;
mod leaks;
mod outage;
mod recovery;
mod roles;
mod schedule;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Not a test: what the tests' other processes do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    match role.split_once(' ') {
        Some(("soak", role)) => roles::play(role, &arguments),
        Some(("victim", role)) => recovery::play(role),
        _ if role == "nursery" => leaks::nursery(&arguments),
        _ => panic!("no role {role}"),
    }
}

/// The tests measure times: one after the other.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number from the environment.
fn setting(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable} is {value:?}; expected a number")))
}
