//! The kill harness: a victim is stepped through one operation and killed behind each instruction, and its survivors look
//! whether the contract holds (SPEC §4.1, §4.2, §4.6).
//!
//! **Where a kill can make a difference.** What others can ever see of a process is what it has stored in shared memory and what
//! it has asked of the kernel; both change by nothing but an instruction that writes to a shared mapping, or a system call. A
//! kill takes effect between two instructions (or two rounds of a string instruction): what came before it reaches
//! memory, and does so before the death is proven; what comes behind it never happens. Its registers, its private memory and what
//! it had *read* go with it, and its descriptors, mappings and threads are those of its last system call. So all kills between
//! one write or system call and the next leave the same world behind, and a kill before each of them, and one behind all, stand
//! for a kill behind every instruction. One that sleeps in a system call is one more case: it is killed there, too. What is
//! left out is a call that the kernel itself cuts short in the middle, a long `pwrite`, say.
//!
//! Runs at every instruction, and at every read of shared memory, test that argument, and the harness's idea of which
//! instructions touch shared memory.
//!
//! A short run (`cargo test`) kills before each write and system call of an operation and at one in so many of its other
//! instructions, densest on the fast paths; of what coordinators do it takes a sample. `SHMBUS_TEST_SEED` repeats it.
//!
//! Long runs are for a release build. `SHMBUS_KILL_LONG=1` covers every instruction of publish, receive and ack, and each
//! read, write and system call of everything else (of a successor whose predecessor died amid its deed, each write and call): two
//! hours, most of them over coordinators and their successors. `SHMBUS_KILL_LONG=writes` leaves out what only reads, or nothing:
//! half an hour. `SHMBUS_KILL_ONLY=move` runs only what has that in its name, so that several can run side by side. Where
//! processes must not be traced the tests say so and pass.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod checker;
#[path = "../common/mod.rs"]
mod common;
mod consumers;
mod coordinator;
mod group_deeds;
mod joining;
mod mutant;
mod named;
mod requests;
mod runner;
mod scenarios;
mod shared_access;
mod sleepers;
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
        ("hold", _) => coordinator::hold(&bus, &arguments),
        ("member", Some((role, _))) => group_deeds::member(&bus, role),
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
        if !runner::is_chosen(scenario.name) {
            continue;
        }
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
fn a_publisher_stopped_at_any_instruction_delays_nobody() {
    survive("stop");
}

#[test]
fn a_publisher_killed_over_a_numbered_batch_retries_it_whole() {
    survive("numbered batch");
}

#[test]
fn a_subscriber_killed_at_any_instruction() {
    survive("receive");
}

#[test]
fn who_is_killed_asleep_or_awaking_holds_nobody_up() {
    survive("sleep");
}

#[test]
fn who_is_killed_asking_or_answering_is_missed_at_once() {
    survive("request");
    survive("reply");
}

#[test]
fn a_newcomer_killed_anywhere_leaves_its_place_free() {
    survive("join");
}

#[test]
fn a_consumer_killed_anywhere_leaves_each_message_settled_or_to_be_delivered_again() {
    survive("consume");
}

#[test]
fn a_consumer_killed_anywhere_in_a_move_leaves_one_dead_letter() {
    survive("move");
}

#[test]
fn a_pipeline_killed_anywhere_leaves_each_output_once() {
    survive("pipeline");
}

#[test]
fn a_standby_killed_anywhere_in_its_take_over_is_succeeded() {
    survive("take-over");
}

#[test]
fn who_is_killed_anywhere_adopting_a_move_is_succeeded() {
    survive("adoption");
}

/// Kills coordinators in the deeds whose names begin so and demands that nothing is broken or leaked; in a
/// short run in so many of them.
fn succeed(prefixes: &[&str], most: usize) {
    if !is_permitted() {
        return;
    }
    let seed = seed();
    let mut violations = 0;
    let named = |deed: &coordinator::Deed| {
        prefixes.iter().any(|prefix| deed.name.starts_with(prefix)) && runner::is_chosen(deed.name)
    };
    let mut deeds: Vec<_> = coordinator::all().into_iter().filter(named).collect();
    let mut random = common::Random::new(seed);
    while !runner::is_long() && deeds.len() > most {
        deeds.remove(random.below(deeds.len() as u64) as usize);
    }
    for deed in &deeds {
        let began = std::time::Instant::now();
        let report = coordinator::run(deed, seed).unwrap_or_else(|error| panic!("{}: {error}", deed.name));
        println!("{report} {:.1?}", began.elapsed());
        violations += report.violations.len();
    }
    assert_eq!(violations, 0, "the contract was broken; see above");
}

#[test]
fn a_coordinator_killed_in_a_request_is_succeeded() {
    succeed(&["join", "create", "open", "remove"], 2);
}

#[test]
fn a_coordinator_killed_over_a_burial_is_succeeded() {
    succeed(&["bury"], 1);
}

#[test]
fn a_coordinator_killed_over_a_group_is_succeeded() {
    // What clients and coordinator say to each other about groups takes millions of instructions, each of which is counted.
    succeed(&["group:"], 1);
}

#[test]
fn a_successor_killed_anywhere_from_its_start_on_is_succeeded() {
    if !is_permitted() {
        return;
    }
    let seed = seed();
    let mut deeds: Vec<_> = coordinator::all().into_iter().filter(|deed| runner::is_chosen(deed.name)).collect();
    let mut random = common::Random::new(seed);
    while !runner::is_long() && deeds.len() > 1 {
        deeds.remove(random.below(deeds.len() as u64) as usize);
    }
    let mut violations = 0;
    for deed in &deeds {
        let began = std::time::Instant::now();
        let reports = coordinator::run_successor(deed, seed).unwrap_or_else(|error| panic!("{}: {error}", deed.name));
        for report in reports {
            println!("{report} {:.1?}", began.elapsed());
            violations += report.violations.len();
        }
    }
    assert_eq!(violations, 0, "the contract was broken; see above");
}

#[test]
fn an_adopter_killed_anywhere_from_its_start_on_is_succeeded() {
    if !is_permitted() || !runner::is_chosen(coordinator::ADOPTION) {
        return;
    }
    let reports = coordinator::run_adopter(seed()).unwrap();
    reports.iter().for_each(|report| println!("{report}"));
    let violations: usize = reports.iter().map(|report| report.violations.len()).sum();
    assert_eq!(violations, 0, "the contract was broken; see above");
}

/// Runs a scenario with a planted fault. A harness that has never found anything proves nothing.
fn find(fault: &str, by: &str) {
    if !is_permitted() || !runner::is_chosen(fault) {
        return;
    }
    let report = runner::run(&scenarios::named(fault), seed()).unwrap();
    println!("{report}");
    assert!(report.violations.iter().any(|violation| violation.contains(by)), "the planted fault was not found");
}

#[test]
fn the_harness_finds_a_publisher_that_claims_before_it_writes() {
    find(mutant::NAME, "torn");
}

#[test]
fn the_harness_finds_a_consumer_that_settles_before_it_publishes_the_letter() {
    find(consumers::SETTLES_FIRST, "delivered: [], results: []");
}

#[test]
fn the_harness_finds_a_lease_in_nobodys_name() {
    find(consumers::ANONYMOUS, "the floor stays");
}
