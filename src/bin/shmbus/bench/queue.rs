//! A queue: one group, a consumer in each of two processes, which lease and ack every message.
//!
//! Each chunk first fills the ring, which does not count; then both processes empty it, which does.

use std::sync::atomic::Ordering;

use anyhow::ensure;
use shmbus::{Bus, Consumer, GroupOptions, Payload, Publisher, Wait};

use super::args::Setup;
use super::pair::{Order, Pair, Peer};
use super::wire::Wire;
use super::{Chunks, Stage, THERE, canary, interleave, report, stream};

/// The group's name.
const GROUP: &str = "bench";

/// Messages the ring holds, and thus messages a chunk, unless `--ring` says otherwise.
pub(super) const RING: u64 = 32_768;

/// One chunk's figures.
pub(super) struct Drained {
    pub(super) messages_per_s: f64,
    pub(super) lost: u64,
}

/// What one consumer acknowledged: how many, and the sum of their numbers.
#[derive(Default)]
struct Share {
    count: u64,
    sum: u64,
}

pub(super) fn open<T: Payload + ?Sized>(bus: &Bus, setup: &Setup) -> anyhow::Result<Consumer<T>> {
    // The longest window that a group may have.
    let window = setup.ring().next_power_of_two().min(1 << 20);
    let options = GroupOptions::new().window(window);
    Ok(bus.consumer(setup.topic(THERE), GROUP).options(options).wait(Wait::Spin).open()?)
}

pub(super) fn run<W: Wire>(stage: &Stage<'_>, wire: W) -> anyhow::Result<()> {
    let setup = &stage.task.setup;
    stage.bus.create(&setup.topic::<W::Payload>(THERE))?;
    let publisher = stream::open(stage.bus, setup)?;
    let consumer = open(stage.bus, setup)?;
    let (chunks, lost) = measure(publisher, consumer, wire, Pair::start(stage)?, setup)?;
    report::queue(stage.json, setup, stage.cores, &chunks)?;
    ensure!(lost == 0, "{lost} messages of the queue were not acknowledged exactly once");
    Ok(())
}

/// The chunks, and how many messages were not acknowledged exactly once.
fn measure<W: Wire>(
    mut publisher: Publisher<W::Payload>,
    mut consumer: Consumer<W::Payload>,
    mut wire: W,
    mut pair: Pair,
    setup: &Setup,
) -> anyhow::Result<(Chunks<Drained>, u64)> {
    let count = setup.held();
    let (mut number, mut lost_in_all) = (0, 0);
    let chunks = interleave(&mut pair, setup.run.seconds, |pair| {
        stream::send(&mut publisher, &mut wire, number, count, 1)?;
        pair.begin(Order::Bus, count, number);
        let started = pair.clock.ticks();
        let mine = drain(&mut consumer, &mut wire, setup.batch)?;
        pair.finish()?;
        let ns = pair.clock.ns(pair.clock.ticks() - started);
        let lines = pair.lines();
        let (theirs, sum) = (lines.arrived.load(Ordering::Relaxed), lines.sum.load(Ordering::Relaxed));
        let expected = (number..number + count).fold(0u64, u64::wrapping_add);
        let wrong_sum = mine.sum.wrapping_add(sum) != expected;
        let lost = count.abs_diff(mine.count + theirs).max(u64::from(wrong_sum));
        number += count;
        lost_in_all += lost;
        Ok(Drained { messages_per_s: count as f64 * 1e9 / ns, lost })
    })?;
    Ok((chunks, lost_in_all))
}

/// The other process: the second consumer.
pub(super) fn answer<W: Wire>(
    mut consumer: Consumer<W::Payload>,
    mut wire: W,
    batch: u32,
    mut peer: Peer,
) -> anyhow::Result<()> {
    loop {
        let received = peer.next()?;
        match received.order {
            Order::Canary => canary::answer(&peer, received.count)?,
            Order::Bus => {
                let share = drain(&mut consumer, &mut wire, batch)?;
                let lines = peer.lines();
                lines.arrived.store(share.count, Ordering::Relaxed);
                lines.sum.store(share.sum, Ordering::Relaxed);
            }
            Order::Bare => {}
            Order::Quit => return Ok(()),
        }
        peer.done();
    }
}

/// Leases and acks until nothing is left. Everything was published before.
fn drain<W: Wire>(consumer: &mut Consumer<W::Payload>, wire: &mut W, batch: u32) -> anyhow::Result<Share> {
    let mut share = Share::default();
    if batch == 1 {
        while let Some(delivery) = consumer.try_recv()? {
            share.add(wire.read(&delivery));
            delivery.ack()?;
        }
        return Ok(share);
    }
    while let Some(deliveries) = consumer.try_recv_batch(batch as usize)? {
        deliveries.iter().for_each(|delivery| share.add(wire.read(&delivery)));
        deliveries.ack()?;
    }
    Ok(share)
}

impl Share {
    fn add(&mut self, number: Option<u64>) {
        if let Some(number) = number {
            self.count += 1;
            self.sum = self.sum.wrapping_add(number);
        }
    }
}
