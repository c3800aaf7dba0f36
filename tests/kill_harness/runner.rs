//! Kills one victim at each chosen instruction of a scenario's operation and has the survivors look.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::checker::{Kill, Survivors, Violation};
use crate::common::{Random, Scene};
use crate::scenarios::{Grain, Scenario};
use crate::shared_access::{Effect, Lens};
use crate::tracer::{Stop, Tracee};

/// Set: everything is covered, however long it takes; `writes`: but for what only reads shared memory, or nothing.
const LONG: &str = "SHMBUS_KILL_LONG";

/// Set: only scenarios and deeds whose names contain it are run.
const ONLY: &str = "SHMBUS_KILL_ONLY";

/// After so many violations a scenario has failed clearly enough.
pub(crate) const MAX_VIOLATIONS: usize = 5;

/// An operation that takes more than this many instructions waits for something.
pub(crate) const MAX_STEPS: usize = 5_000_000;

/// How often a long run goes for a place that a victim does not come by: where it goes depends on where the ring is, and on the
/// clock, so that it is stepped there every other time.
const MOST_TRIES: usize = 8;

/// Lives that a long run lets pass before it looks where victims go.
const NEW_LIVES: u64 = 24;

/// How long a victim may take to come to its moment.
const PATIENCE: Duration = Duration::from_millis(300);

/// The same for one that is stepped there.
const STEPPED_PATIENCE: Duration = Duration::from_secs(5);

/// What came of a scenario.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) name: String,
    pub(crate) instructions: usize,
    pub(crate) writes: usize,
    pub(crate) system_calls: usize,
    pub(crate) kills: usize,
    /// Places that were not reached: the victim did not come by, and was killed where it was.
    pub(crate) missed: usize,
    pub(crate) violations: Vec<Violation>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { name, instructions, writes, system_calls, kills, missed, violations } = self;
        write!(f, "{name:42} {instructions:7} instructions {writes:5} writes {system_calls:4} calls ")?;
        write!(f, "{kills:6} kills {missed:3} missed {:3} violations", violations.len())?;
        violations.iter().try_for_each(|violation| write!(f, "\n    {violation}"))
    }
}

/// Whether a scenario or deed of this name is to be run.
pub(crate) fn is_chosen(name: &str) -> bool {
    std::env::var(ONLY).map_or(true, |part| name.contains(&part))
}

/// Whether a long run also covers what only reads.
pub(crate) fn covers_reads() -> bool {
    is_long() && std::env::var(LONG).is_ok_and(|value| value != "writes")
}

pub(crate) fn is_long() -> bool {
    std::env::var_os(LONG).is_some_and(|value| !value.is_empty() && value != "0")
}

/// How often to go for a place.
pub(crate) fn most_tries() -> usize {
    if is_long() { MOST_TRIES } else { 1 }
}

/// Runs a scenario to its end.
pub(crate) fn run(scenario: &Scenario, seed: u64) -> io::Result<Report> {
    let steps = count(scenario)?;
    let of = |wanted: Effect| steps.iter().filter(|step| step.effect == wanted).count();
    let last = steps.len() - 1;
    let mut report = Report {
        name: scenario.name.to_owned(),
        instructions: last,
        writes: of(Effect::Write),
        system_calls: of(Effect::SystemCall),
        ..Report::default()
    };
    let mut points = VecDeque::from(points(scenario, &steps, &mut Random::new(seed)));
    let (mut life, mut tries) = (0, 0);
    let enough = if scenario.grain == Grain::Fault { 1 } else { MAX_VIOLATIONS };
    while !points.is_empty() && report.violations.len() < enough {
        // What a violation leaves behind would only lead to the next.
        let scene = Scene::new("kill");
        let mut survivors = (scenario.survivors)(&scene.open()).map_err(io::Error::other)?;
        while let Some(&point) = points.front() {
            life += 1;
            report.kills += 1;
            tries += 1;
            let moment = Moment { stepped: tries % 2 == 0 && !point.asleep, ..Moment::of(&steps, point) };
            let (reached, survived) = kill_at(&scene, scenario, &mut *survivors, life, &moment)?;
            if reached || tries == most_tries() || survived.is_err() {
                report.missed += usize::from(!reached);
                points.pop_front();
                tries = 0;
            }
            if let Err(violation) = survived {
                let (at, effect) = (if point.asleep { "in" } else { "before" }, steps[point.step].effect);
                report
                    .violations
                    .push(format!("killed {at} instruction {} of {last} ({effect:?}): {violation}", point.step));
                break;
            }
        }
    }
    Ok(report)
}

/// An instruction of the operation; the last one is the marker behind it.
struct Step {
    effect: Effect,
    /// Whether it may sleep on a word until somebody wakes it.
    sleeps: bool,
    /// The same in each life: victims are loaded without randomization.
    address: u64,
}

/// When to kill.
struct Moment {
    address: u64,
    /// At which visit of the address, and after how many rounds of its string instruction.
    visit: u64,
    rounds: u64,
    /// Not before it, but asleep in it.
    asleep: bool,
    /// It is not to run there, but to be stepped.
    stepped: bool,
    before_all: bool,
    after_all: bool,
}

/// The step before which to kill, or in which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Point {
    step: usize,
    asleep: bool,
}

impl Moment {
    fn of(steps: &[Step], Point { step: point, asleep }: Point) -> Moment {
        let address = steps[point].address;
        // A string instruction stays where it is; a breakpoint there is met once.
        let arrives = |at: &usize| steps[*at].address == address && (*at == 0 || steps[*at - 1].address != address);
        let arrivals: Vec<usize> = (0..=point).filter(arrives).collect();
        let rounds = arrivals.last().map_or(0, |arrived| point - arrived) as u64;
        let (visit, before_all, after_all) = (arrivals.len() as u64, point == 0, point == steps.len() - 1);
        Moment { address, visit, rounds, asleep, stepped: false, before_all: before_all && !asleep, after_all }
    }
}

/// How many instructions to execute before each kill.
fn points(scenario: &Scenario, steps: &[Step], random: &mut Random) -> Vec<Point> {
    let asleep = (0..steps.len()).filter(|step| steps[*step].sleeps).map(|step| Point { step, asleep: true });
    let before = before(scenario, steps, random).into_iter().map(|step| Point { step, asleep: false });
    before.chain(asleep).collect()
}

/// The steps before which to kill.
fn before(scenario: &Scenario, steps: &[Step], random: &mut Random) -> Vec<usize> {
    let last = steps.len() - 1;
    if covers_reads() && scenario.grain == Grain::Instruction {
        return (0..=last).collect();
    }
    // Others can tell apart only what a write or a system call separates: before each is after the one before it.
    let notable = |at: &usize| match steps[*at].effect {
        Effect::Read => covers_reads(),
        effect => matches!(effect, Effect::Write | Effect::SystemCall),
    };
    let mut points: Vec<usize> = (0..last).filter(notable).chain([0, last]).collect();
    points.extend((random.below(scenario.stride as u64) as usize..last).step_by(scenario.stride));
    points.sort_unstable();
    points.dedup();
    points
}

/// Starts a victim on the scene; it stands before its operation, and so are the survivors.
fn victim(
    scene: &Scene,
    scenario: &Scenario,
    survivors: &mut dyn Survivors,
    life: u64,
) -> io::Result<Result<Tracee, Violation>> {
    let command = scene.command("victim", &format!("{life} {}", scenario.name));
    let mut tracee = Tracee::spawn(command)?;
    tracee.run_to_marker()?;
    Ok(survivors.ready(life).map(|()| tracee))
}

/// Each instruction of the operation.
fn count(scenario: &Scenario) -> io::Result<Vec<Step>> {
    let scene = Scene::new("count");
    let mut survivors = (scenario.survivors)(&scene.open()).map_err(io::Error::other)?;
    // The first life finds everything new, which none after it does; a ring that has not been round yet is new to some more.
    let lives = if is_long() { NEW_LIVES } else { 1 };
    // What a planted fault does in its life is not to be seen yet.
    let lives_through = scenario.grain != Grain::Fault;
    for life in 1..=lives {
        let mut new = victim(&scene, scenario, &mut *survivors, life)?.map_err(io::Error::other)?;
        if lives_through {
            survivors.favour(new.sleeper()).map_err(io::Error::other)?;
            new.run_to_end()?;
        }
        kill(new, &mut *survivors, life, !lives_through, lives_through).map_err(io::Error::other)?;
    }
    let mut tracee = victim(&scene, scenario, &mut *survivors, lives + 1)?.map_err(io::Error::other)?;
    survivors.favour(tracee.sleeper()).map_err(io::Error::other)?;
    let (mut lens, mut steps) = (Lens::new(), Vec::new());
    loop {
        let registers = tracee.registers()?;
        let effect = lens.look(&tracee, &registers)?;
        let sleeps = effect == Effect::SystemCall && may_sleep(&registers);
        steps.push(Step { effect, sleeps, address: registers.rip });
        if effect == Effect::Marker {
            return Ok(steps);
        }
        if tracee.step()? == Stop::Ended || steps.len() > MAX_STEPS {
            return Err(io::Error::other(format!("the operation did not end in {} instructions", steps.len())));
        }
    }
}

/// Whether the moment came, and whether the kill was survived.
fn kill_at(
    scene: &Scene,
    scenario: &Scenario,
    survivors: &mut dyn Survivors,
    life: u64,
    moment: &Moment,
) -> io::Result<(bool, Result<(), Violation>)> {
    let mut tracee = match victim(scene, scenario, survivors, life)? {
        Ok(tracee) => tracee,
        Err(violation) => return Ok((false, Err(violation))),
    };
    if !moment.asleep
        && let Err(violation) = survivors.favour(tracee.sleeper())
    {
        return Ok((false, Err(violation)));
    }
    // Its first instruction it stands before.
    let reached = match moment {
        Moment { before_all: true, .. } => true,
        Moment { stepped: true, .. } => tracee.step_to_address(moment.address, moment.visit, STEPPED_PATIENCE)?,
        _ => tracee.run_to_address(moment.address, moment.visit, PATIENCE)?,
    };
    for _ in 0..if reached { moment.rounds } else { 0 } {
        if tracee.step()? == Stop::Ended {
            return Err(io::Error::other("the victim ended by itself"));
        }
    }
    let reached = reached && (!moment.asleep || falls_asleep(&mut tracee)?);
    if reached && let Err(violation) = survivors.meanwhile(life) {
        return Ok((true, Err(violation)));
    }
    Ok((reached, kill(tracee, survivors, life, moment.before_all, reached && moment.after_all)))
}

/// Whether a system call may wait on a word.
fn may_sleep(registers: &libc::user_regs_struct) -> bool {
    let command = registers.rsi as i32 & libc::FUTEX_CMD_MASK;
    match registers.rax as i64 {
        libc::SYS_futex => matches!(command, libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET),
        libc::SYS_futex_waitv => true,
        _ => false,
    }
}

/// Whether the system call that it is about to make puts it to sleep.
fn falls_asleep(tracee: &mut Tracee) -> io::Result<bool> {
    tracee.begin_step()?;
    let end = Instant::now() + PATIENCE;
    while !tracee.sleeper().sleeps() {
        if Instant::now() > end {
            return Ok(false);
        }
        thread::sleep(Duration::from_micros(50));
    }
    Ok(true)
}

fn kill(
    tracee: Tracee,
    survivors: &mut dyn Survivors,
    life: u64,
    before_all: bool,
    after_all: bool,
) -> Result<(), Violation> {
    let (pid, progress) = (tracee.pid(), tracee.progress());
    tracee.kill();
    survivors.after(Kill { life, pid, before_all, after_all, progress })
}
