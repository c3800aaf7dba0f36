//! The kill harness: a victim is stepped through one operation and killed behind each instruction, and its survivors look
//! whether the contract holds (SPEC §4.1, §4.6).
//!
//! A short run kills before each write to shared memory and each system call, since nothing else can be told apart from
//! outside, and at one in so many of the other instructions, densest on the fast paths; of what the coordinator does it takes a
//! sample. `SHMBUS_TEST_SEED` repeats it. `SHMBUS_KILL_LONG=1` covers every instruction of the operations (hours in a debug
//! build; name a test) and every shared access and system call of the coordinator (a minute). Where processes must not be
//! traced the tests say so and pass.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod checker;
#[path = "../common/mod.rs"]
mod common;
mod coordinator;
mod mutant;
mod runner;
mod scenarios;
mod shared_access;
mod tracer;

use common::seed;
use shmbus::Bus;

/// Not a test: what the victims do.
#[test]
fn role() {
    let Some((role, arguments)) = common::role() else { return };
    if role == "join" {
        return coordinator::join();
    }
    let bus = Bus::open_default().unwrap();
    match (role.as_str(), arguments.split_once(' ')) {
        ("victim", Some((life, name))) => (scenarios::named(name).victim)(&bus, life.parse().unwrap()),
        ("hold", _) => coordinator::hold(&bus),
        _ => panic!("no role {role} {arguments}"),
    }
}

/// Whether processes may be traced here; says so if not.
fn is_permitted() -> bool {
    let forbidden = tracer::forbidden();
    if let Some(reason) = &forbidden {
        println!("skipped: {reason}");
    }
    forbidden.is_none()
}

/// Runs the scenarios whose names begin so and demands that none finds a violation.
fn survive(prefix: &str) {
    if !is_permitted() {
        return;
    }
    let seed = seed();
    let mut violations = 0;
    for scenario in scenarios::all().iter().filter(|scenario| scenario.name.starts_with(prefix)) {
        let began = std::time::Instant::now();
        let report = runner::run(scenario, seed).unwrap_or_else(|error| panic!("{}: {error}", scenario.name));
        println!("{report} {:.1?}", began.elapsed());
        violations += report.violations.len();
    }
    assert_eq!(violations, 0, "the contract was broken; see above");
}

#[test]
fn a_publisher_killed_at_any_instruction_exclusive() {
    survive("publish exclusive");
}

#[test]
fn a_publisher_killed_at_any_instruction_many() {
    survive("publish many");
}

#[test]
fn a_publisher_killed_at_any_instruction_channel() {
    survive("publish channel");
}

#[test]
fn a_subscriber_killed_at_any_instruction() {
    survive("receive");
}

/// Kills coordinators in the deeds of these numbers and demands that nothing is broken or leaked.
fn succeed(deeds: std::ops::Range<usize>) {
    if !is_permitted() {
        return;
    }
    let seed = seed();
    let mut violations = 0;
    for deed in &coordinator::all()[deeds] {
        let began = std::time::Instant::now();
        let report = coordinator::run(deed, seed).unwrap_or_else(|error| panic!("{}: {error}", deed.name));
        println!("{report} {:.1?}", began.elapsed());
        violations += report.violations.len();
    }
    assert_eq!(violations, 0, "the contract was broken; see above");
}

#[test]
fn a_coordinator_killed_in_a_request_is_succeeded() {
    succeed(0..6);
}

#[test]
fn a_coordinator_killed_over_a_burial_is_succeeded() {
    succeed(6..7);
}

/// A harness that has never found anything proves nothing.
#[test]
fn the_harness_finds_a_publisher_that_claims_before_it_writes() {
    if !is_permitted() {
        return;
    }
    let report = runner::run(&scenarios::named(mutant::NAME), seed()).unwrap();
    println!("{report}");
    assert!(report.violations.iter().any(|violation| violation.contains("torn")), "the planted fault was not found");
}
