//! `shmbus bench`: what the bus costs, beside what the machine itself takes for the same transfer.
//!
//! Two processes on two cores; this one is both controller and first end, because a third would disturb them. Virtual
//! cores move between host cores, so no figure means anything alone: each chunk of a few milliseconds stands between
//! two chunks of the bare cache-line ping-pong (`canary`), counts only if both say the same class of machine, and is
//! reported by class with the bare figure beside it.

mod canary;
mod clock;
mod pair;
mod pingpong;
mod queue;
mod report;
mod stream;
mod wire;

use std::os::fd::RawFd;
use std::time::Duration;

use anyhow::ensure;
use indicatif::{ProgressBar, ProgressStyle};
use shmbus::{Bus, Topic};

use crate::sandbox::Sandbox;
use crate::signals;
use crate::values::{self, ModeArg};
use crate::{Ended, Globals};
use canary::{Canary, Class};
use pair::{Pair, Peer};
use wire::{Bytes, Wire, Words};

pub(crate) use report::{PingpongLine, StreamLine};

/// Measure the bus against the bare machine: two processes on two cores, on a private bus.
///
/// Every few milliseconds the bare cache-line ping-pong of the same two processes is measured; its median tells the
/// class of the two cores at that moment: SMT (one core), CCX (one L3 cache) or FAR. Chunks during which the class
/// changed are dropped; figures are medians over the chunks of a class, with the bare figure beside them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    workload: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Round trips: there on one topic, back on another
    ///
    /// With --json one object a class: {workload, payload_bytes, mode, class, chunks, p50_ns, p99_ns, p999_ns,
    /// bare_p50_ns, bare_p99_ns, bare_p999_ns, ratio_p50, ratio_p99}. The ratios are to the bare ping-pong.
    #[command(after_help = "Example: shmbus bench pingpong --size 64 --mode exclusive --seconds 5")]
    Pingpong(Setup),
    /// A stream one way; every message's number is checked
    ///
    /// With --json one object a class: {workload, payload_bytes, mode, class, chunks, batch, messages_per_s,
    /// bytes_per_s, bare_bytes_per_s, bare_p50_ns, ratio_bytes, lost}. The bare figure is one core's memcpy.
    #[command(after_help = "Example: shmbus bench stream --size 64K --mode exclusive")]
    Stream(Setup),
    /// A queue: two consumers of one group lease and ack every message
    ///
    /// With --json one object a class: {workload, payload_bytes, mode, class, chunks, batch, messages_per_s, bare_p50_ns,
    /// lost}. lost counts messages that were not acknowledged exactly once.
    #[command(after_help = "Example: shmbus bench queue --batch 32")]
    Queue(Setup),
    /// The other process of a bench; started by it
    #[command(hide = true)]
    Peer(PeerArgs),
}

/// What to measure; both processes get the same.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Setup {
    /// Payload bytes, 8 or more; 64 means one cache line on the bus, that is 56 bytes of payload
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = values::size)]
    size: u64,
    /// Kind of topic
    #[arg(long, value_enum, default_value_t = ModeArg::Exclusive)]
    mode: ModeArg,
    /// How long to measure
    #[arg(long, value_name = "N", default_value_t = 3.0)]
    seconds: f64,
    /// Messages a publish (stream), or a receive and ack (queue)
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u32,
    /// Messages the ring holds [default: 4096, or as many as fit in 4 MiB; queue: 32768]
    #[arg(long, value_name = "N")]
    ring: Option<u64>,
    /// The two cores to run on [default: the first two of different physical cores]
    #[arg(long, value_name = "A,B", value_parser = values::two_cores)]
    cores: Option<[usize; 2]>,
}

#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PeerArgs {
    workload: Workload,
    #[command(flatten)]
    setup: Setup,
    /// Descriptor of the control region
    #[arg(long)]
    control_fd: RawFd,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    Pingpong,
    Stream,
    Queue,
}

/// In-flight bytes that the caches still hold; more makes large messages slower (RESEARCH.md §2).
const IN_FLIGHT_BYTES: u64 = 4 << 20;

impl Setup {
    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.size >= 8, "--size is {}; at least 8, each message carries its number", self.size);
        ensure!((1..=1024).contains(&self.batch), "--batch is {}; 1 to 1024 are allowed", self.batch);
        ensure!(self.seconds > 0.0 && self.seconds <= 3600.0, "--seconds is {}; up to 3600 are allowed", self.seconds);
        Ok(())
    }

    fn payload_bytes(&self) -> u64 {
        if self.size == 64 { 56 } else { self.size }
    }

    fn topic<T: shmbus::Payload + ?Sized>(&self, name: &str) -> Topic<T> {
        let fits = (IN_FLIGHT_BYTES / self.size).clamp(4, 4096);
        let topic = Topic::named(name).messages(self.ring.unwrap_or(fits));
        let topic = match self.mode {
            ModeArg::Many => topic,
            ModeArg::Exclusive => topic.exclusive(),
            ModeArg::Channel => topic.channel(),
        };
        match self.size {
            8 | 64 => topic, // typed: the library knows what it needs
            size => topic.bytes((4 * size).max(IN_FLIGHT_BYTES)),
        }
    }
}

/// The topics of a bench: there (and, for round trips, back).
const THERE: &str = "bench.there";
const BACK: &str = "bench.back";

pub(crate) fn run(globals: &Globals, args: Args) -> anyhow::Result<Ended> {
    let (workload, setup) = match args.workload {
        Command::Pingpong(setup) => (Workload::Pingpong, setup),
        Command::Stream(setup) => (Workload::Stream, setup),
        Command::Queue(mut setup) => {
            setup.ring.get_or_insert(queue::RING);
            (Workload::Queue, setup)
        }
        Command::Peer(peer) => return run_peer(globals, &peer).map(|()| Ended::Well),
    };
    setup.check()?;
    // A chunk takes milliseconds and every wait looks for signals: what the grace cannot end is stuck.
    signals::install(Duration::from_secs(15), Box::new(Sandbox::abandon))?;
    let sandbox = Sandbox::new()?;
    let measured = match setup.size {
        8 => measure(globals, workload, &setup, &sandbox, Words::<1>::new(&setup)),
        64 => measure(globals, workload, &setup, &sandbox, Words::<7>::new(&setup)),
        _ => measure(globals, workload, &setup, &sandbox, Bytes::new(workload, &setup)),
    };
    let closed = sandbox.close();
    if let Some(signal) = signals::caught() {
        return Ok(Ended::BySignal(signal));
    }
    measured.and(closed).map(|()| Ended::Well)
}

/// This process's side: controller and first end.
fn measure<W: Wire>(
    globals: &Globals,
    workload: Workload,
    setup: &Setup,
    sandbox: &Sandbox,
    wire: W,
) -> anyhow::Result<()> {
    let bus = sandbox.open()?; // before pinning, or the coordinator would inherit our core
    for topic in [setup.topic::<W::Payload>(THERE), setup.topic(BACK)] {
        bus.create_topic(topic.name(), &topic.options(), false)?;
    }
    let cores = pair::choose_cores(setup.cores)?;
    match workload {
        Workload::Pingpong => {
            let ends = pingpong::Ends::open(&bus, setup, wire, THERE, BACK)?;
            let pair = Pair::start(sandbox, workload, setup, cores)?;
            let chunks = pingpong::measure(ends, pair, setup)?;
            report::pingpong(globals.json, setup, cores, &chunks)
        }
        Workload::Stream => {
            let publisher = stream::open(&bus, setup)?;
            let pair = Pair::start(sandbox, workload, setup, cores)?;
            let (chunks, lost) = stream::measure(publisher, wire, pair, setup)?;
            report::stream(globals.json, setup, cores, &chunks)?;
            ensure!(lost == 0, "{lost} messages of the stream were lost or garbled");
            Ok(())
        }
        Workload::Queue => {
            let publisher = stream::open(&bus, setup)?;
            let consumer = queue::open(&bus, setup)?;
            let pair = Pair::start(sandbox, workload, setup, cores)?;
            let (chunks, lost) = queue::measure(publisher, consumer, wire, pair, setup)?;
            report::queue(globals.json, setup, cores, &chunks)?;
            ensure!(lost == 0, "{lost} messages of the queue were not acknowledged exactly once");
            Ok(())
        }
    }
}

/// The other process's side.
fn run_peer(globals: &Globals, args: &PeerArgs) -> anyhow::Result<()> {
    let bus = globals.open_bus()?;
    match args.setup.size {
        8 => answer(&bus, args, Words::<1>::new(&args.setup)),
        64 => answer(&bus, args, Words::<7>::new(&args.setup)),
        _ => answer(&bus, args, Bytes::new(args.workload, &args.setup)),
    }
}

fn answer<W: Wire>(bus: &Bus, args: &PeerArgs, wire: W) -> anyhow::Result<()> {
    match args.workload {
        Workload::Pingpong => {
            let ends = pingpong::Ends::open(bus, &args.setup, wire, BACK, THERE)?;
            pingpong::answer(ends, Peer::attach(args)?)
        }
        Workload::Stream => {
            let subscriber = bus.subscriber(args.setup.topic::<W::Payload>(THERE)).wait(shmbus::Wait::Spin).open()?;
            stream::answer(subscriber, wire, Peer::attach(args)?)
        }
        Workload::Queue => {
            let consumer = queue::open(bus, &args.setup)?;
            queue::answer(consumer, wire, args.setup.batch, Peer::attach(args)?)
        }
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
