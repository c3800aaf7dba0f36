//! Round trips on the bus: a message there, its number back.

use anyhow::{anyhow, ensure};
use shmbus::{Bus, Publisher, Subscriber, Wait};

use super::args::Setup;
use super::canary::{self, Quantiles};
use super::pair::{Order, Pair, Peer};
use super::wire::Wire;
use super::{BACK, Chunks, Stage, THERE, interleave, report};

/// Length of one chunk on the bus.
const CHUNK_NS: f64 = 2_000_000.0;

/// Polls between two looks at the other process.
const LOOK_POLLS: u32 = 1 << 16;

/// One process's two handles.
pub(super) struct Ends<W: Wire> {
    wire: W,
    outgoing: Publisher<W::Payload>,
    incoming: Subscriber<W::Payload>,
}

impl<W: Wire> Ends<W> {
    pub(super) fn open(bus: &Bus, setup: &Setup, wire: W, outgoing: &str, incoming: &str) -> anyhow::Result<Self> {
        Ok(Ends {
            wire,
            outgoing: bus.publisher(setup.topic(outgoing))?.wait(Wait::Spin),
            incoming: bus.subscriber(setup.topic(incoming)).wait(Wait::Spin).open()?,
        })
    }

    /// Spins for the next message's number.
    #[inline]
    fn receive(&mut self, check: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<u64> {
        let mut polls: u32 = 0;
        loop {
            if let Some(message) = self.incoming.try_recv()? {
                return self.wire.read(&message).ok_or_else(|| anyhow!("a message arrived garbled"));
            }
            polls = polls.wrapping_add(1);
            if polls.is_multiple_of(LOOK_POLLS) {
                check()?;
            }
            std::hint::spin_loop();
        }
    }
}

pub(super) fn run<W: Wire>(stage: &Stage<'_>, wire: W) -> anyhow::Result<()> {
    let setup = &stage.task.setup;
    for name in [THERE, BACK] {
        stage.bus.create(&setup.topic::<W::Payload>(name))?;
    }
    let ends = Ends::open(stage.bus, setup, wire, THERE, BACK)?;
    let chunks = measure(ends, Pair::start(stage)?, setup)?;
    report::pingpong(stage.json, setup, stage.cores, &chunks)
}

fn measure<W: Wire>(mut ends: Ends<W>, mut pair: Pair, setup: &Setup) -> anyhow::Result<Chunks<Quantiles>> {
    let mut number = 0;
    let mut expected_ns = 1000.0;
    interleave(&mut pair, setup.run.seconds, |pair| {
        let count = (CHUNK_NS / expected_ns).clamp(50.0, 50_000.0) as u64;
        let quantiles = chunk(&mut ends, pair, &mut number, count)?;
        expected_ns = quantiles.p50_ns.max(1.0);
        Ok(quantiles)
    })
}

fn chunk<W: Wire>(ends: &mut Ends<W>, pair: &mut Pair, number: &mut u64, count: u64) -> anyhow::Result<Quantiles> {
    let mut stamps = std::mem::take(&mut pair.stamps);
    stamps.clear();
    pair.begin(Order::Bus, count, *number);
    stamps.push(pair.clock.ticks());
    for _ in 0..count {
        ends.wire.send(&mut ends.outgoing, *number)?;
        let back = ends.receive(|| pair.check())?;
        stamps.push(pair.clock.ticks());
        ensure!(back == *number, "message {back} came back instead of {number}");
        *number += 1;
    }
    pair.finish()?;
    let quantiles = Quantiles::of_stamps(&pair.clock, &stamps);
    pair.stamps = stamps;
    Ok(quantiles)
}

/// The other process: sends back what it gets.
pub(super) fn answer<W: Wire>(mut ends: Ends<W>, mut peer: Peer) -> anyhow::Result<()> {
    loop {
        let received = peer.next()?;
        match received.order {
            Order::Canary => canary::answer(&peer, received.count)?,
            Order::Bus => {
                for _ in 0..received.count {
                    let number = ends.receive(|| peer.check())?;
                    ends.wire.send(&mut ends.outgoing, number)?;
                }
            }
            Order::Bare => {}
            Order::Quit => return Ok(()),
        }
        peer.done();
    }
}
