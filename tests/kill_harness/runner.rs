//! Kills one victim at each chosen instruction of a scenario's operation and has the survivors look.

use std::fmt;
use std::io;

use crate::checker::{Kill, Survivors, Violation};
use crate::common::{Random, Scene};
use crate::scenarios::Scenario;
use crate::shared_access::{Effect, Lens};
use crate::tracer::{Stop, Tracee};

/// Set: everything is covered, however long it takes.
const LONG: &str = "SHMBUS_KILL_LONG";

/// After so many violations a scenario has failed clearly enough.
const MAX_VIOLATIONS: usize = 5;

/// An operation that takes more than this many instructions waits for something.
pub(crate) const MAX_STEPS: usize = 5_000_000;

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

pub(crate) fn is_long() -> bool {
    std::env::var_os(LONG).is_some_and(|value| !value.is_empty() && value != "0")
}

/// Runs a scenario to its end.
pub(crate) fn run(scenario: &Scenario, seed: u64) -> io::Result<Report> {
    let effects = count(scenario)?;
    let of = |wanted: Effect| effects.iter().filter(|effect| **effect == wanted).count();
    let mut report = Report {
        name: scenario.name.to_owned(),
        instructions: effects.len(),
        writes: of(Effect::Write),
        system_calls: of(Effect::SystemCall),
        ..Report::default()
    };
    let mut points = points(scenario, &effects, &mut Random::new(seed)).into_iter().peekable();
    let mut life = 0;
    while points.peek().is_some() && report.violations.len() < MAX_VIOLATIONS {
        // What a violation leaves behind would only lead to the next.
        let scene = Scene::new("kill");
        let mut survivors = (scenario.survivors)(&scene.open()).map_err(io::Error::other)?;
        for point in points.by_ref() {
            life += 1;
            report.kills += 1;
            if let Err(violation) = kill_at(&scene, scenario, &mut *survivors, life, point, effects.len())? {
                report.violations.push(format!("killed after {point} of {} instructions: {violation}", effects.len()));
                break;
            }
        }
    }
    Ok(report)
}

/// How many instructions to execute before each kill.
fn points(scenario: &Scenario, effects: &[Effect], random: &mut Random) -> Vec<usize> {
    let last = effects.len();
    if is_long() {
        return (0..=last).collect();
    }
    // Others can tell apart only what a write or a system call separates: before each is after the one before it.
    let notable = |at: &usize| matches!(effects[*at], Effect::Write | Effect::SystemCall);
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

/// The effect of each instruction of the operation.
fn count(scenario: &Scenario) -> io::Result<Vec<Effect>> {
    let scene = Scene::new("count");
    let mut survivors = (scenario.survivors)(&scene.open()).map_err(io::Error::other)?;
    // The second life: the first finds everything new, which none after it does.
    kill_at(&scene, scenario, &mut *survivors, 1, 0, 1)?.map_err(io::Error::other)?;
    let mut tracee = victim(&scene, scenario, &mut *survivors, 2)?.map_err(io::Error::other)?;
    let (mut lens, mut effects) = (Lens::new(), Vec::new());
    loop {
        match lens.look(&tracee, &tracee.registers()?)? {
            Effect::Marker => return Ok(effects),
            effect => effects.push(effect),
        }
        if tracee.step()? == Stop::Ended || effects.len() > MAX_STEPS {
            return Err(io::Error::other(format!("the operation did not end in {} instructions", effects.len())));
        }
    }
}

fn kill_at(
    scene: &Scene,
    scenario: &Scenario,
    survivors: &mut dyn Survivors,
    life: u64,
    point: usize,
    last: usize,
) -> io::Result<Result<(), Violation>> {
    let mut tracee = match victim(scene, scenario, survivors, life)? {
        Ok(tracee) => tracee,
        Err(violation) => return Ok(Err(violation)),
    };
    for _ in 0..point {
        if tracee.step()? == Stop::Ended {
            return Err(io::Error::other("the victim ended by itself"));
        }
    }
    let (pid, before_all) = (tracee.pid(), point == 0);
    // The count may differ by a few from life to life, so only the marker is proof of the end.
    let after_all = point == last && matches!(Lens::new().look(&tracee, &tracee.registers()?)?, Effect::Marker);
    tracee.kill();
    Ok(survivors.after(Kill { life, pid, before_all, after_all }))
}
