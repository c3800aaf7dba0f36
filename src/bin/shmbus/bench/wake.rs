//! From a publish to the return of a subscriber that sleeps, beside a futex that wakes the same process on the same core.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;
use shmbus::{Bus, Payload, Publisher, RecvError, Subscriber, Wait};

use super::args::{Run, Setup};
use super::canary::Quantiles;
use super::line::{Figures, LATENCY_HEADS, Line};
use super::pair::{Order, Pair, Peer};
use super::report::{by_class, footnote_of_all, median, rounded, title};
use super::wire::Wire;
use super::{Chunk, Chunks, Stage, THERE, canary, interleave};
use crate::output::{Table, json_line};
use crate::values::{self, ModeArg};

/// Length of one chunk, about, and what a wake takes of it beside the sleep.
const CHUNK_US: u64 = 5_000;
const WAKE_US: u64 = 50;

/// The longest sleep in one go; then the sleeper looks whether anybody is there to wake it.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// How long it may take to fall asleep.
const SLEEP_LIMIT: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Payload bytes, 8 or more; 64 means one cache line on the bus, that is 56 bytes of payload
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = values::size)]
    size: u64,
    /// Kind of topic
    #[arg(long, value_enum, default_value_t = ModeArg::Exclusive)]
    mode: ModeArg,
    /// How long it has slept when it is woken, in microseconds: the deeper the sleep, the longer the wake
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    idle: u64,
    #[command(flatten)]
    run: Run,
}

impl Args {
    pub(super) fn setup(&self) -> Setup {
        Setup { size: self.size, mode: self.mode, batch: 1, ring: None, run: self.run.clone() }
    }
}

/// One chunk's wakes, in nanoseconds.
struct Wakes {
    bus: Vec<u64>,
    bare: Vec<u64>,
}

/// Nanoseconds of the one clock that both processes read, and that no core is ahead of.
fn now_ns() -> anyhow::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

pub(super) fn run<W: Wire>(stage: &Stage<'_>, wire: W, args: &Args) -> anyhow::Result<()> {
    let setup = &stage.task.setup;
    stage.bus.create(&setup.topic::<W::Payload>(THERE))?;
    let publisher = stage.bus.publisher(setup.topic::<W::Payload>(THERE))?.wait(Wait::Spin);
    let pair = Pair::start(stage)?;
    let chunks = measure(publisher, wire, pair, args)?;
    report(stage, args, &chunks)
}

fn measure<W: Wire>(
    mut publisher: Publisher<W::Payload>,
    mut wire: W,
    mut pair: Pair,
    args: &Args,
) -> anyhow::Result<Chunks<Wakes>> {
    let sleeper = Sleeper::find(&pair, Duration::from_micros(args.idle))?;
    let count = (CHUNK_US / (2 * (args.idle + WAKE_US))).max(1);
    let mut number = 0;
    interleave(&mut pair, args.run.seconds, |pair| {
        let mut wakes = Wakes { bus: Vec::new(), bare: Vec::new() };
        pair.begin(Order::Bus, count, number);
        for number in number..number + count {
            wakes.bare.push(sleeper.wake(pair, || ring(&pair.lines().bell))?);
            wakes.bus.push(sleeper.wake(pair, || Ok(wire.send(&mut publisher, number)?))?);
        }
        number += count;
        pair.finish()?;
        Ok(wakes)
    })
}

/// The other process as seen from this one.
struct Sleeper {
    /// Where the kernel says what its first thread does.
    state: File,
    idle: Duration,
}

impl Sleeper {
    fn find(pair: &Pair, idle: Duration) -> anyhow::Result<Sleeper> {
        let path = format!("/proc/{0}/task/{0}/stat", pair.peer_pid());
        let state = File::open(&path).with_context(|| format!("cannot tell whether the subscriber sleeps: {path}"))?;
        Ok(Sleeper { state, idle })
    }

    /// Nanoseconds from before `act` until the sleeper, which must be woken by it, has returned.
    fn wake(&self, pair: &Pair, act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<u64> {
        let before = pair.lines().woken_ns.load(Ordering::Acquire);
        self.await_sleep(pair)?;
        let started_ns = now_ns()?;
        act()?;
        pair.spin_until(|lines| lines.woken_ns.load(Ordering::Acquire) != before)?;
        Ok(pair.lines().woken_ns.load(Ordering::Acquire).saturating_sub(started_ns))
    }

    /// Returns when it has slept for `idle`. It spins or works otherwise, so there is nothing else that it could sleep in.
    fn await_sleep(&self, pair: &Pair) -> anyhow::Result<()> {
        let awake = Instant::now();
        while !self.is_asleep()? {
            pair.check()?;
            ensure!(awake.elapsed() < SLEEP_LIMIT, "the subscriber has not gone to sleep for {SLEEP_LIMIT:?}");
        }
        let asleep = Instant::now();
        while asleep.elapsed() < self.idle {
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn is_asleep(&self) -> anyhow::Result<bool> {
        let mut text = [0; 256];
        let len = self.state.read_at(&mut text, 0).context("the other process is gone")?;
        // PID (NAME) STATE ...; the name may have anything in it, also `)`.
        let end = text[..len].iter().rposition(|&b| b == b')').context("no state in /proc/PID/stat")?;
        Ok(text[..len].get(end + 2) == Some(&b'S'))
    }
}

/// Wakes whoever sleeps on the word, and says so there.
fn ring(bell: &AtomicU32) -> anyhow::Result<()> {
    bell.fetch_add(1, Ordering::Release);
    // SAFETY: FUTEX_WAKE uses the address only as a name.
    let woken = unsafe { libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    ensure!(woken >= 0, "futex wake: {}", std::io::Error::last_os_error());
    Ok(())
}

/// Sleeps until the word is no longer what it was.
fn sleep_on(bell: &AtomicU32, was: u32, check: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let limit = libc::timespec { tv_sec: LONGEST_SLEEP.as_secs() as libc::time_t, tv_nsec: 0 };
    while bell.load(Ordering::Acquire) == was {
        // SAFETY: the word lives for the call, and the kernel only reads it and the timespec. Every outcome is a return,
        // after which we look again.
        unsafe {
            libc::syscall(libc::SYS_futex, bell.as_ptr(), libc::FUTEX_WAIT, was, &raw const limit);
        }
        if bell.load(Ordering::Acquire) == was {
            check()?;
        }
    }
    Ok(())
}

/// The other process's handle.
pub(super) fn open<T: Payload + ?Sized>(bus: &Bus, setup: &Setup) -> anyhow::Result<Subscriber<T>> {
    Ok(bus.subscriber(setup.topic(THERE)).wait(Wait::Park).open()?)
}

/// The other process: sleeps, says when it was woken, and sleeps again; on the bare word and on the bus by turns.
pub(super) fn answer<W: Wire>(
    mut subscriber: Subscriber<W::Payload>,
    mut wire: W,
    mut peer: Peer,
) -> anyhow::Result<()> {
    let mut rung = 0;
    loop {
        let received = peer.next()?;
        match received.order {
            Order::Canary => canary::answer(&peer, received.count)?,
            Order::Bus => {
                for number in received.first..received.first + received.count {
                    sleep_on(&peer.lines().bell, rung, || peer.check())?;
                    woken(&peer)?;
                    rung = rung.wrapping_add(1);
                    receive(&mut subscriber, &mut wire, &peer, number)?;
                }
            }
            Order::Bare => {}
            Order::Quit => return Ok(()),
        }
        peer.done();
    }
}

/// Takes down when this process was woken.
fn woken(peer: &Peer) -> anyhow::Result<()> {
    peer.lines().woken_ns.store(now_ns()?, Ordering::Release);
    Ok(())
}

/// Sleeps until the message with this number is there.
fn receive<W: Wire>(
    subscriber: &mut Subscriber<W::Payload>,
    wire: &mut W,
    peer: &Peer,
    number: u64,
) -> anyhow::Result<()> {
    loop {
        match subscriber.recv_timeout(LONGEST_SLEEP) {
            Ok(message) => {
                woken(peer)?;
                let found = wire.read(&message);
                ensure!(found == Some(number), "message {found:?} came instead of {number}");
                return Ok(());
            }
            Err(RecvError::TimedOut) => peer.check()?,
            Err(e) => bail!(e),
        }
    }
}

/// What a line has beside the common figures.
#[derive(Serialize)]
struct Extra {
    idle_us: u64,
    /// Wakes by the bus; as many were bare.
    wakes: usize,
    canary_p50_ns: f64,
}

fn report(stage: &Stage<'_>, args: &Args, chunks: &Chunks<Wakes>) -> anyhow::Result<()> {
    let classes = by_class(chunks)?;
    let line = |(class, of): &(_, Vec<_>)| Line::new(stage, *class, of.len(), figures(of), extra(args, of));
    let lines: Vec<Line<Extra>> = classes.iter().map(line).collect();
    if stage.json {
        return lines.iter().try_for_each(json_line).map_err(Into::into);
    }
    title(&format!("wakes after {} µs of sleep", args.idle), &stage.task.setup, stage.cores)?;
    let mut table = Table::new(&[&["CLASS", "WAKES"], &LATENCY_HEADS[..], &["PINGPONG NS"]].concat());
    for l in &lines {
        let cells = [l.class.to_string(), l.extra.wakes.to_string()].into_iter().chain(l.figures.latency_cells());
        table.row(cells.chain([format!("{:.0}", l.extra.canary_p50_ns)]));
    }
    table.print()?;
    footnote_of_all("a futex that wakes the same process from the same sleep", chunks.dropped)
}

fn figures(chunks: &[&Chunk<Wakes>]) -> Figures {
    let bus = Quantiles::of_ns(chunks.iter().flat_map(|c| &c.sample.bus));
    let bare = Quantiles::of_ns(chunks.iter().flat_map(|c| &c.sample.bare));
    Figures::of_latencies(&bus, &bare)
}

fn extra(args: &Args, chunks: &[&Chunk<Wakes>]) -> Extra {
    Extra {
        idle_us: args.idle,
        wakes: chunks.iter().map(|c| c.sample.bus.len()).sum(),
        canary_p50_ns: rounded(median(chunks.iter().map(|c| c.bare.0.p50_ns)), 10.0),
    }
}
