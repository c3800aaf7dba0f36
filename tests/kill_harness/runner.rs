//! Kills one victim at each chosen instruction of a scenario's operation and has the survivors look.

use std::fmt;
use std::io;
use std::time::Duration;

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
const MAX_VIOLATIONS: usize = 5;

/// An operation that takes more than this many instructions waits for something.
pub(crate) const MAX_STEPS: usize = 5_000_000;

/// How long a victim may take to come to its moment.
const PATIENCE: Duration = Duration::from_millis(300);

/// What came of a scenario.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) name: String,
    pub(crate) instructions: usize,
    pub(crate) writes: usize,
    pub(crate) system_calls: usize,
    pub(crate) kills: usize,
    /// Kills elsewhere than intended: the victim did not come to the place this time.
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
    let mut points = points(scenario, &steps, &mut Random::new(seed)).into_iter().peekable();
    let mut life = 0;
    let enough = if scenario.grain == Grain::Fault { 1 } else { MAX_VIOLATIONS };
    while points.peek().is_some() && report.violations.len() < enough {
        // What a violation leaves behind would only lead to the next.
        let scene = Scene::new("kill");
        let mut survivors = (scenario.survivors)(&scene.open()).map_err(io::Error::other)?;
        for point in points.by_ref() {
            life += 1;
            report.kills += 1;
            let (reached, survived) = kill_at(&scene, scenario, &mut *survivors, life, &Moment::of(&steps, point))?;
            report.missed += usize::from(!reached);
            if let Err(violation) = survived {
                let effect = steps[point].effect;
                report
                    .violations
                    .push(format!("killed after {point} of {last} instructions ({effect:?}): {violation}"));
                break;
            }
        }
    }
    Ok(report)
}

/// An instruction of the operation; the last one is the marker behind it.
struct Step {
    effect: Effect,
    /// The same in each life: victims are loaded without randomization.
    address: u64,
}

/// When to kill.
struct Moment {
    address: u64,
    /// At which visit of the address, and after how many rounds of its string instruction.
    visit: u64,
    rounds: u64,
    before_all: bool,
    after_all: bool,
}

impl Moment {
    /// Before the step of this number.
    fn of(steps: &[Step], point: usize) -> Moment {
        let address = steps[point].address;
        // A string instruction stays where it is; a breakpoint there is met once.
        let arrives = |at: &usize| steps[*at].address == address && (*at == 0 || steps[*at - 1].address != address);
        let arrivals: Vec<usize> = (0..=point).filter(arrives).collect();
        let rounds = arrivals.last().map_or(0, |arrived| point - arrived) as u64;
        let (visit, before_all, after_all) = (arrivals.len() as u64, point == 0, point == steps.len() - 1);
        Moment { address, visit, rounds, before_all, after_all }
    }
}

/// How many instructions to execute before each kill.
fn points(scenario: &Scenario, steps: &[Step], random: &mut Random) -> Vec<usize> {
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
    // The second life: the first finds everything new, which none after it does.
    let first = victim(&scene, scenario, &mut *survivors, 1)?.map_err(io::Error::other)?;
    kill(first, &mut *survivors, 1, true, false).map_err(io::Error::other)?;
    let mut tracee = victim(&scene, scenario, &mut *survivors, 2)?.map_err(io::Error::other)?;
    let (mut lens, mut steps) = (Lens::new(), Vec::new());
    loop {
        let registers = tracee.registers()?;
        let effect = lens.look(&tracee, &registers)?;
        steps.push(Step { effect, address: registers.rip });
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
    // Its first instruction it stands before.
    let reached = moment.before_all || tracee.run_to_address(moment.address, moment.visit, PATIENCE)?;
    for _ in 0..if reached { moment.rounds } else { 0 } {
        if tracee.step()? == Stop::Ended {
            return Err(io::Error::other("the victim ended by itself"));
        }
    }
    Ok((reached, kill(tracee, survivors, life, moment.before_all, reached && moment.after_all)))
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
