//! What can be asked of `shmbus bench`, and what its other process is told.

use std::os::fd::RawFd;

use anyhow::ensure;
use shmbus::{Payload, Topic};

use super::{fanin, fanout, join, queue, wake};
use crate::values::{self, ModeArg};

/// Measure the bus against the bare machine: two processes on two cores, on a private bus.
///
/// Every few milliseconds the bare cache-line ping-pong of the same two processes is measured; its median tells the
/// class of the two cores at that moment: SMT (one core), CCX (one L3 cache) or FAR. Chunks during which the class
/// changed are dropped; figures are medians over the chunks of a class, with the bare figure beside them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(clap::Subcommand)]
pub(super) enum Command {
    #[command(flatten)]
    Measure(Work),
    /// The other process of a bench; started by it
    #[command(hide = true)]
    Peer(PeerArgs),
}

/// What can be measured.
#[derive(clap::Subcommand)]
pub(super) enum Work {
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
    /// What a publish costs with many subscribers attached, beside one
    ///
    /// Two topics alike: one has a single subscriber, the other --subscribers of them, all in the other process.
    /// Timed are bursts of --burst messages, by turns on either topic, from before the first publish until the last
    /// has returned. No subscriber runs meanwhile, so none takes the publisher's core; but each holds its cursor where
    /// the last burst ended, which keeps the publisher looking at all of them. A burst fits in the ring, so none has to
    /// be waited for. Behind each pair of bursts, untimed, every subscriber reads and checks everything.
    ///
    /// With --json one object a class: {workload, payload_bytes, mode, class, chunks, p50_ns, p99_ns, p999_ns,
    /// bare_p50_ns, bare_p99_ns, bare_p999_ns, ratio_p50, ratio_p99, messages_per_s, bytes_per_s, bare_bytes_per_s,
    /// lost, batch, subscribers, burst, one_p50_ns, ratio_one}. p50_ns is the cost of one message with all attached
    /// (bursts divided by their messages), one_p50_ns with one, ratio_one the first over the second; the bare figure is
    /// the ping-pong, which tells the class. Null: p99 and p99.9 (a burst says nothing of a single publish), ratios to the
    /// ping-pong, and rates.
    #[command(after_help = "Example: shmbus bench fanout --subscribers 64 --mode exclusive")]
    Fanout(fanout::Args),
    /// Two publishers on one ordered topic, and a subscriber that checks that nothing is lost
    ///
    /// Both processes publish at once, half of a ring each; timed until both have finished. Then, untimed, a subscriber in
    /// the first process reads all of it: there is no third core for it.
    ///
    /// With --json one object a class: {workload, payload_bytes, mode, class, chunks, p50_ns, p99_ns, p999_ns,
    /// bare_p50_ns, bare_p99_ns, bare_p999_ns, ratio_p50, ratio_p99, messages_per_s, bytes_per_s, bare_bytes_per_s,
    /// lost, batch, publishers, bare_swaps_per_s, ratio_swaps}. Rates are both publishers' together. The bare figures:
    /// one core's memcpy; how often the same processes compare-and-swap one word, each as fast as it can (whoever has the
    /// line goes on for a while), which no total order without batches exceeds (ratio_swaps is the publishes, or batches, over
    /// those); and bare_p50_ns of the ping-pong. Other latencies are null. lost counts messages that the subscriber did not get whole, once and in their publisher's order.
    #[command(after_help = "Example: shmbus bench fanin --batch 16")]
    Fanin(fanin::Args),
    /// A queue: two consumers of one group lease and ack every message
    ///
    /// With --json one object a class: {workload, payload_bytes, mode, class, chunks, batch, messages_per_s, bare_p50_ns,
    /// lost}. lost counts messages that were not acknowledged exactly once.
    #[command(after_help = "Example: shmbus bench queue --batch 32")]
    Queue(Setup),
    /// From a publish to the return of a subscriber that sleeps, beside a bare futex wake
    ///
    /// By turns the publisher wakes the other process with a message and with nothing but a futex, each time when that has
    /// slept for --idle microseconds. Timed from before the publish (or before the futex word is stored) until the
    /// receive (or the futex wait) has returned, by one clock for both processes.
    ///
    /// With --json one object a class: {workload, payload_bytes, mode, class, chunks, p50_ns, p99_ns, p999_ns,
    /// bare_p50_ns, bare_p99_ns, bare_p999_ns, ratio_p50, ratio_p99, messages_per_s, bytes_per_s, bare_bytes_per_s,
    /// lost, idle_us, wakes, canary_p50_ns}. The bare figures are the futex's, canary_p50_ns is the ping-pong that
    /// tells the class; quantiles are of all wakes of a class. Rates and lost are null.
    #[command(after_help = "Example: shmbus bench wake --idle 1000")]
    Wake(wake::Args),
    /// What a process that is connected waits for a handle on an existing topic
    ///
    /// Timed is each opening of a subscriber, of a publisher (whose memory is there from the one before), and of a new
    /// connection with a subscriber, until the handle is returned. The bare figure: the other process, woken by one byte
    /// on a socket, hands over a descriptor of memory as large as the topic's payloads, which is mapped, populated and
    /// read. The topic is one for many, empty, with one publisher. Coordinator and other process run on whichever core is free.
    ///
    /// With --json one object a class and kind of handle: {workload, payload_bytes, mode, class, chunks, p50_ns, p99_ns,
    /// p999_ns, bare_p50_ns, bare_p99_ns, bare_p999_ns, ratio_p50, ratio_p99, messages_per_s, bytes_per_s,
    /// bare_bytes_per_s, lost, handle ("subscriber", "publisher" or "bus and subscriber"), topic_bytes, topics,
    /// joins, canary_p50_ns}. Quantiles are of all openings of a class. payload_bytes, rates and lost are null.
    #[command(after_help = "Example: shmbus bench join --topics 10000")]
    Join(join::Args),
}

/// What is measured; both processes get the same.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Task {
    pub(super) workload: Workload,
    #[command(flatten)]
    pub(super) setup: Setup,
    /// Subscribers of the other process (fanout)
    #[arg(long, default_value_t = 1)]
    pub(super) subscribers: u32,
}

/// Messages and topics.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Setup {
    /// Payload bytes, 8 or more; 64 means one cache line on the bus, that is 56 bytes of payload
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = values::size)]
    pub(super) size: u64,
    /// Kind of topic
    #[arg(long, value_enum, default_value_t = ModeArg::Exclusive)]
    pub(super) mode: ModeArg,
    /// Messages a publish (stream, fanout), or a receive and ack (queue)
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(super) batch: u32,
    /// Messages the ring holds [default: 4096, or as many as fit in 4 MiB; queue: 32768]
    #[arg(long, value_name = "N")]
    pub(super) ring: Option<u64>,
    #[command(flatten)]
    pub(super) run: Run,
}

/// How long, and where.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Run {
    /// How long to measure
    #[arg(long, value_name = "N", default_value_t = 3.0)]
    pub(super) seconds: f64,
    /// The two cores to run on [default: the first two of different physical cores]
    #[arg(long, value_name = "A,B", value_parser = values::two_cores)]
    pub(super) cores: Option<[usize; 2]>,
}

#[derive(clap::Args, Clone, Debug)]
pub(crate) struct PeerArgs {
    #[command(flatten)]
    pub(super) task: Task,
    /// Descriptor of the control region
    #[arg(long)]
    pub(super) control_fd: RawFd,
}

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Workload {
    Pingpong,
    Stream,
    Fanout,
    Fanin,
    Queue,
    Wake,
    Join,
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Workload::Pingpong => "pingpong",
            Workload::Stream => "stream",
            Workload::Fanout => "fanout",
            Workload::Fanin => "fanin",
            Workload::Queue => "queue",
            Workload::Wake => "wake",
            Workload::Join => "join",
        })
    }
}

impl Work {
    /// What both processes are to know.
    pub(super) fn task(&self) -> Task {
        let task = |workload, setup| Task { workload, setup, subscribers: 1 };
        match self {
            Work::Pingpong(setup) => task(Workload::Pingpong, setup.clone()),
            Work::Stream(setup) => task(Workload::Stream, setup.clone()),
            Work::Fanout(args) => Task { subscribers: args.subscribers, ..task(Workload::Fanout, args.setup.clone()) },
            Work::Fanin(args) => task(Workload::Fanin, args.setup()),
            Work::Queue(setup) => {
                let ring = setup.ring.or(Some(queue::RING));
                task(Workload::Queue, Setup { ring, ..setup.clone() })
            }
            Work::Wake(args) => task(Workload::Wake, args.setup()),
            Work::Join(args) => task(Workload::Join, args.setup()),
        }
    }
}

/// In-flight bytes that the caches still hold; more makes large messages slower (RESEARCH.md §2).
const IN_FLIGHT_BYTES: u64 = 4 << 20;

impl Setup {
    pub(super) fn check(&self) -> anyhow::Result<()> {
        let seconds = self.run.seconds;
        ensure!(self.size >= 8, "--size is {}; at least 8, each message carries its number", self.size);
        ensure!((1..=1024).contains(&self.batch), "--batch is {}; 1 to 1024 are allowed", self.batch);
        ensure!(seconds > 0.0 && seconds <= 3600.0, "--seconds is {seconds}; up to 3600 are allowed");
        Ok(())
    }

    pub(super) fn payload_bytes(&self) -> u64 {
        if self.size == 64 { 56 } else { self.size }
    }

    /// Messages that the ring holds.
    pub(super) fn ring(&self) -> u64 {
        self.ring.unwrap_or((IN_FLIGHT_BYTES / self.size).clamp(4, 4096))
    }

    /// Messages that are sure to find room before anything is read.
    pub(super) fn held(&self) -> u64 {
        match self.payload_room() {
            None => self.ring(),
            Some(bytes) => self.ring().min(bytes / self.size),
        }
    }

    pub(super) fn topic<T: Payload + ?Sized>(&self, name: &str) -> Topic<T> {
        let topic = Topic::named(name).messages(self.ring());
        let topic = match self.mode {
            ModeArg::Many => topic,
            ModeArg::Exclusive => topic.exclusive(),
            ModeArg::Channel => topic.channel(),
        };
        match self.payload_room() {
            None => topic,
            Some(bytes) => topic.bytes(bytes),
        }
    }

    /// Payload bytes to ask for; typed messages need nobody to ask, the library knows.
    fn payload_room(&self) -> Option<u64> {
        let typed = matches!(self.size, 8 | 64);
        (!typed).then(|| (4 * self.size).max(IN_FLIGHT_BYTES))
    }
}
