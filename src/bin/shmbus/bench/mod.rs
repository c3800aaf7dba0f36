//! `shmbus bench`: what the bus costs, beside what the machine itself takes for the same transfer.
//!
//! Two processes on two cores; this one is both controller and first end, because a third would disturb them. Virtual
//! cores move between host cores, so no figure means anything alone: each chunk of a few milliseconds stands between
//! two chunks of the bare cache-line ping-pong (`canary`), counts only if both say the same class of machine, and is
//! reported by class with the bare figure beside it.

mod args;
mod canary;
mod clock;
mod fanin;
mod fanout;
mod join;
mod line;
mod pair;
mod pingpong;
mod queue;
mod report;
mod stream;
mod wake;
mod wire;

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use shmbus::{Bus, Wait};

use crate::sandbox::Sandbox;
use crate::signals;
use crate::{Ended, Globals};
pub(crate) use args::Args;
use args::{Command, PeerArgs, Task, Work, Workload};
use canary::{Canary, Class};
use pair::{Pair, Peer};
use wire::{Bytes, Wire, Words};

pub(crate) use report::{PingpongLine, StreamLine};

/// The topics of a bench: there (and, for round trips, back).
const THERE: &str = "bench.there";
const BACK: &str = "bench.back";

/// Where a workload is measured.
struct Stage<'a> {
    json: bool,
    sandbox: &'a Sandbox,
    bus: &'a Bus,
    task: &'a Task,
    cores: [usize; 2],
}

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let work = match args.command {
        Command::Measure(work) => work,
        Command::Peer(peer) => return run_peer(globals, &peer).map(|()| Ended::Well),
    };
    let task = work.task();
    task.setup.check()?;
    // A chunk takes milliseconds and every wait looks for signals: what the grace cannot end is stuck.
    signals::install(Duration::from_secs(15), Box::new(Sandbox::abandon))?;
    let sandbox = Sandbox::new()?;
    let measured = measure(globals, &work, &task, &sandbox);
    let closed = sandbox.close();
    if let Some(signal) = signals::caught() {
        return Ok(Ended::BySignal(signal));
    }
    measured.and(closed).map(|()| Ended::Well)
}

/// This process's side: controller and first end.
fn measure(globals: &Globals, work: &Work, task: &Task, sandbox: &Sandbox) -> anyhow::Result<()> {
    let cores = pair::choose_cores(task.setup.run.cores)?;
    let bus = sandbox.open()?; // before pinning, or the coordinator would inherit our core
    let stage = Stage { json: globals.json, sandbox, bus: &bus, task, cores };
    match task.setup.size {
        8 => measure_with(&stage, work, Words::<1>::new(&task.setup)),
        64 => measure_with(&stage, work, Words::<7>::new(&task.setup)),
        _ => measure_with(&stage, work, Bytes::new(task)),
    }
}

fn measure_with<W: Wire>(stage: &Stage<'_>, work: &Work, wire: W) -> anyhow::Result<()> {
    match work {
        Work::Pingpong(_) => pingpong::run(stage, wire),
        Work::Stream(_) => stream::run(stage, wire),
        Work::Fanout(args) => fanout::run(stage, wire, args),
        Work::Fanin(args) => fanin::run(stage, wire, args),
        Work::Queue(_) => queue::run(stage, wire),
        Work::Wake(args) => wake::run(stage, wire, args),
        Work::Join(args) => join::run(stage, args),
    }
}

/// The other process's side.
fn run_peer(globals: &Globals, args: &PeerArgs) -> anyhow::Result<()> {
    let bus = globals.open_bus()?;
    match args.task.setup.size {
        8 => answer(&bus, args, Words::<1>::new(&args.task.setup)),
        64 => answer(&bus, args, Words::<7>::new(&args.task.setup)),
        _ => answer(&bus, args, Bytes::new(&args.task)),
    }
}

fn answer<W: Wire>(bus: &Bus, args: &PeerArgs, wire: W) -> anyhow::Result<()> {
    let setup = &args.task.setup;
    match args.task.workload {
        Workload::Pingpong => {
            let ends = pingpong::Ends::open(bus, setup, wire, BACK, THERE)?;
            pingpong::answer(ends, Peer::attach(args)?)
        }
        Workload::Stream => {
            let subscriber = bus.subscriber(setup.topic::<W::Payload>(THERE)).wait(Wait::Spin).open()?;
            stream::answer(subscriber, wire, Peer::attach(args)?)
        }
        Workload::Fanout => {
            let subscribers = fanout::open(bus, setup, args.task.subscribers)?;
            fanout::answer(subscribers, wire, Peer::attach(args)?)
        }
        Workload::Fanin => {
            let publisher = stream::open(bus, setup)?;
            fanin::answer(publisher, wire, setup.batch, Peer::attach(args)?)
        }
        Workload::Queue => {
            let consumer = queue::open(bus, setup)?;
            queue::answer(consumer, wire, setup.batch, Peer::attach(args)?)
        }
        Workload::Wake => wake::answer(wake::open(bus, setup)?, wire, Peer::attach(args)?),
        Workload::Join => join::answer(Peer::attach(args)?),
    }
}

/// One chunk's figures with what the bare machine did just before and after.
pub(crate) struct Chunk<S> {
    class: Class,
    bare: Canary,
    sample: S,
}

/// Chunks of one run, and how many were dropped because the cores moved.
pub(crate) struct Chunks<S> {
    kept: Vec<Chunk<S>>,
    dropped: usize,
}

/// The share of the time given that passes before anything counts: caches, branch predictors and clocks settle.
const WARM_UP: f64 = 0.1;

/// How many times the time given may pass until one chunk counts: on a machine that is busy a first may take seconds.
const PATIENCE: f64 = 10.0;

/// Bare, bus, bare, bus, ... bare; so every bus chunk has a canary on either side.
fn interleave<S>(
    pair: &mut Pair,
    seconds: f64,
    mut sample: impl FnMut(&mut Pair) -> anyhow::Result<S>,
) -> anyhow::Result<Chunks<S>> {
    let progress = progress_bar(seconds);
    let started = std::time::Instant::now();
    let mut chunks = Chunks { kept: Vec::new(), dropped: 0 };
    let mut before = canary::measure(pair)?;
    loop {
        let elapsed = started.elapsed().as_secs_f64();
        let patience = if chunks.kept.is_empty() { PATIENCE } else { 1.0 };
        if elapsed > seconds * (1.0 + WARM_UP) * patience {
            progress.finish_and_clear();
            return Ok(chunks);
        }
        progress.set_position((elapsed * 1e3) as u64);
        let sample = sample(pair)?;
        let after = canary::measure(pair)?;
        if elapsed >= seconds * WARM_UP {
            match before.class() == after.class() {
                true => chunks.kept.push(Chunk { class: after.class(), bare: before.mean(&after), sample }),
                false => chunks.dropped += 1,
            }
        }
        before = after;
    }
}

/// Drawn by this thread between chunks, a few times a second; a ticking thread would take one of the two cores.
fn progress_bar(seconds: f64) -> ProgressBar {
    let style = ProgressStyle::with_template("measuring {bar:40} {percent}%");
    let milliseconds = (seconds * (1.0 + WARM_UP) * 1e3) as u64;
    ProgressBar::new(milliseconds).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}
