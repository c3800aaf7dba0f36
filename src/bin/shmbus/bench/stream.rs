//! A stream on the bus, one way, every message's number checked; and one core's memcpy beside it.

use std::hint::black_box;
use std::sync::atomic::Ordering;

use anyhow::ensure;
use shmbus::{Bus, Publisher, RecvError, Subscriber, Wait};

use super::args::Setup;
use super::clock::Clock;
use super::pair::{Order, Pair, Peer};
use super::wire::Wire;
use super::{Chunks, Stage, THERE, canary, interleave, report};

/// Length of one chunk of the stream, and of the memcpy beside it.
const CHUNK_NS: f64 = 4_000_000.0;
const MEMCPY_NS: f64 = 500_000.0;

/// Most messages in a chunk, should the clock ever mislead us.
const MAX_CHUNK: f64 = 10_000_000.0;

/// Empty polls after which a reader looks whether anything can still come.
const LOOK_POLLS: u32 = 1 << 16;

/// One chunk's figures.
pub(super) struct Flow {
    pub(super) messages_per_s: f64,
    pub(super) bare_bytes_per_s: f64,
    pub(super) lost: u64,
}

pub(super) fn open<T: shmbus::Payload + ?Sized>(bus: &Bus, setup: &Setup) -> anyhow::Result<Publisher<T>> {
    Ok(bus.publisher(setup.topic(THERE))?.wait(Wait::Spin))
}

pub(super) fn run<W: Wire>(stage: &Stage<'_>, wire: W) -> anyhow::Result<()> {
    let setup = &stage.task.setup;
    stage.bus.create(&setup.topic::<W::Payload>(THERE))?;
    let publisher = open(stage.bus, setup)?;
    let (chunks, lost) = measure(publisher, wire, Pair::start(stage)?, setup)?;
    report::stream(stage.json, setup, stage.cores, &chunks)?;
    ensure!(lost == 0, "{lost} messages of the stream were lost or garbled");
    Ok(())
}

/// The chunks, and how many messages were lost in all, those that no chunk counts included.
fn measure<W: Wire>(
    mut publisher: Publisher<W::Payload>,
    mut wire: W,
    mut pair: Pair,
    setup: &Setup,
) -> anyhow::Result<(Chunks<Flow>, u64)> {
    let batch = u64::from(setup.batch);
    let mut copy = Memcpy::new(setup.payload_bytes());
    let (mut number, mut lost_in_all) = (0, 0);
    let mut expected_ns = 1000.0;
    let chunks = interleave(&mut pair, setup.run.seconds, |pair| {
        let count = (CHUNK_NS / expected_ns).clamp(4.0, MAX_CHUNK) as u64;
        let count = count.next_multiple_of(batch);
        pair.begin(Order::Bus, count, number);
        let started = pair.clock.ticks();
        send(&mut publisher, &mut wire, number, count, batch)?;
        pair.all_sent();
        pair.finish()?;
        let ns = pair.clock.ns(pair.clock.ticks() - started);
        number += count;
        expected_ns = (ns / count as f64).max(0.1);
        let lost = pair.lines().lost.load(Ordering::Relaxed);
        lost_in_all += lost;
        Ok(Flow { messages_per_s: count as f64 * 1e9 / ns, bare_bytes_per_s: copy.bytes_per_s(&pair.clock), lost })
    })?;
    Ok((chunks, lost_in_all))
}

/// Publishes `count` messages, numbered from `first` on.
pub(super) fn send<W: Wire>(
    publisher: &mut Publisher<W::Payload>,
    wire: &mut W,
    first: u64,
    count: u64,
    batch: u64,
) -> anyhow::Result<()> {
    if batch == 1 {
        for number in first..first + count {
            wire.send(publisher, number)?;
        }
    } else {
        for number in (first..first + count).step_by(batch as usize) {
            wire.send_batch(publisher, number, batch as usize)?;
        }
    }
    Ok(())
}

/// The other process: counts what does not come.
pub(super) fn answer<W: Wire>(
    mut subscriber: Subscriber<W::Payload>,
    mut wire: W,
    mut peer: Peer,
) -> anyhow::Result<()> {
    loop {
        let received = peer.next()?;
        match received.order {
            Order::Canary => canary::answer(&peer, received.count)?,
            Order::Bus => {
                let arrived = receive(&mut subscriber, &mut wire, &peer, received.first, received.count)?;
                peer.lines().lost.store(received.count - arrived, Ordering::Relaxed);
            }
            Order::Bare => {}
            Order::Quit => return Ok(()),
        }
        peer.done();
    }
}

/// How many of the messages arrived whole, in their order and once.
fn receive<W: Wire>(
    subscriber: &mut Subscriber<W::Payload>,
    wire: &mut W,
    peer: &Peer,
    first: u64,
    count: u64,
) -> anyhow::Result<u64> {
    let last = first + count - 1;
    let (mut next, mut arrived, mut polls) = (first, 0, 0u32);
    while next <= last {
        match subscriber.try_recv() {
            Ok(Some(message)) => {
                if let Some(number) = wire.read(&message).filter(|&number| number >= next && number <= last) {
                    arrived += 1;
                    next = number + 1;
                }
                continue;
            }
            Ok(None) => {}
            Err(RecvError::Lagged { .. }) => continue,
            Err(e) => return Err(e.into()),
        }
        polls = polls.wrapping_add(1);
        if polls.is_multiple_of(LOOK_POLLS) {
            peer.check()?;
            // Everything was published before `all_sent`; if then nothing is there, the rest is lost.
            if peer.all_sent() && subscriber.lag() == 0 {
                break;
            }
        }
        std::hint::spin_loop();
    }
    Ok(arrived)
}

/// The bare limit: copying blocks of a message's size, at least 64 KiB, that stay in this core's own caches.
pub(super) struct Memcpy {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Memcpy {
    pub(super) fn new(payload_bytes: u64) -> Memcpy {
        let len = payload_bytes.max(64 << 10) as usize;
        Memcpy { from: vec![1; len], to: vec![2; len] }
    }

    pub(super) fn bytes_per_s(&mut self, clock: &Clock) -> f64 {
        let started = clock.ticks();
        let (mut copied, mut ns) = (0, 0.0);
        while ns < MEMCPY_NS {
            for _ in 0..8 {
                self.to.copy_from_slice(black_box(&self.from));
                black_box(&mut self.to);
                copied += self.from.len();
            }
            ns = clock.ns(clock.ticks() - started);
        }
        copied as f64 * 1e9 / ns
    }
}
