//! The cost of a publish with many subscribers attached, against one.
//!
//! Two cores cannot run sixty-four readers, and a publisher does not wait for readers: it looks at their cursors, once every
//! sixteenth of the ring. So the readers run between the bursts that are timed, and what a burst meets is what theirs
//! left behind: as many cursors to look at, each on a line that its reader has just written.

use std::sync::atomic::Ordering;

use anyhow::ensure;
use serde::Serialize;
use shmbus::{Bus, Payload, Publisher, RecvError, Subscriber, Wait};

use super::args::Setup;
use super::line::{Figures, Line};
use super::pair::{Order, Pair, Peer};
use super::report::{by_class, footnote, median, rounded, title};
use super::wire::Wire;
use super::{Chunk, Chunks, Stage, canary, interleave, stream};
use crate::output::{Table, json_line, times};
use crate::values::ModeArg;

/// The topic with one subscriber, and the one with all.
const ONE: &str = "bench.one";
const ALL: &str = "bench.all";

/// Pairs of bursts in a chunk: an even number, fewer where many read behind each, so that a chunk takes some milliseconds.
fn rounds(subscribers: u32) -> usize {
    2 * (256 / subscribers as usize).clamp(1, 8)
}

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) setup: Setup,
    /// Subscribers attached
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(super) subscribers: u32,
    /// Messages between two turns of the subscribers, at most half of what the ring holds [default: an eighth: as
    /// often as the publisher looks at cursors, so that each look meets them all changed]
    #[arg(long, value_name = "N")]
    burst: Option<u64>,
}

impl Args {
    /// Messages a burst, in whole batches.
    fn burst(&self) -> anyhow::Result<u64> {
        let (setup, most) = (&self.setup, self.setup.held() / 2);
        let batch = u64::from(setup.batch);
        let burst = self.burst.unwrap_or((setup.held() / 8).max(1)).next_multiple_of(batch);
        ensure!(
            (1..=most).contains(&burst),
            "a burst is {burst} messages (--burst, in batches of {batch}); 1 to {most} fit here, half of what the ring holds"
        );
        Ok(burst)
    }
}

/// One chunk's figures.
struct Costs {
    one_ns: f64,
    all_ns: f64,
    lost: u64,
}

pub(super) fn run<W: Wire>(stage: &Stage<'_>, wire: W, args: &Args) -> anyhow::Result<()> {
    let (setup, burst) = (&args.setup, args.burst()?);
    ensure!(setup.mode != ModeArg::Channel, "a channel has one subscriber; choose --mode exclusive or many");
    let open = |name: &str| -> anyhow::Result<Publisher<W::Payload>> {
        let topic = setup.topic::<W::Payload>(name);
        let mut options = topic.options();
        options.max_subscribers = args.subscribers;
        stage.bus.create_topic(name, &options, false)?;
        Ok(stage.bus.publisher(topic)?.wait(Wait::Spin))
    };
    let publishers = [open(ONE)?, open(ALL)?];
    let pair = Pair::start(stage)?;
    let (chunks, lost) = measure(publishers, wire, pair, setup, burst, rounds(args.subscribers))?;
    report(stage, args, burst, &chunks)?;
    ensure!(lost == 0, "{lost} messages did not reach a subscriber whole and in their order");
    Ok(())
}

/// The chunks, and how many messages were lost in all.
fn measure<W: Wire>(
    mut publishers: [Publisher<W::Payload>; 2],
    mut wire: W,
    mut pair: Pair,
    setup: &Setup,
    burst: u64,
    rounds: usize,
) -> anyhow::Result<(Chunks<Costs>, u64)> {
    let (mut number, mut lost_in_all) = (0, 0);
    let chunks = interleave(&mut pair, setup.run.seconds, |pair| {
        let (mut costs, mut lost) = ([Vec::new(), Vec::new()], 0);
        for round in 0..rounds {
            // Either topic comes first as often: the second finds the core warmer.
            for topic in [round % 2, 1 - round % 2] {
                let started = pair.clock.ticks();
                stream::send(&mut publishers[topic], &mut wire, number, burst, setup.batch.into())?;
                costs[topic].push(pair.clock.ns(pair.clock.ticks() - started) / burst as f64);
            }
            pair.begin(Order::Bus, burst, number);
            pair.finish()?;
            lost += pair.lines().lost.load(Ordering::Relaxed);
            number += burst;
        }
        lost_in_all += lost;
        let [one_ns, all_ns] = costs.map(|ns| median(ns.into_iter()));
        Ok(Costs { one_ns, all_ns, lost })
    })?;
    Ok((chunks, lost_in_all))
}

/// The other process's handles: the subscriber of the one topic, then all those of the other.
pub(super) fn open<T: Payload + ?Sized>(bus: &Bus, setup: &Setup, count: u32) -> anyhow::Result<Vec<Subscriber<T>>> {
    let names = std::iter::once(ONE).chain((0..count).map(|_| ALL));
    names.map(|name| Ok(bus.subscriber(setup.topic(name)).wait(Wait::Spin).open()?)).collect()
}

/// The other process: when a burst is there, every subscriber reads it.
pub(super) fn answer<W: Wire>(
    mut subscribers: Vec<Subscriber<W::Payload>>,
    mut wire: W,
    mut peer: Peer,
) -> anyhow::Result<()> {
    loop {
        let received = peer.next()?;
        match received.order {
            Order::Canary => canary::answer(&peer, received.count)?,
            Order::Bus => {
                let mut lost = 0;
                for subscriber in &mut subscribers {
                    lost += received.count - read(subscriber, &mut wire, received.first, received.count)?;
                }
                peer.lines().lost.store(lost, Ordering::Relaxed);
            }
            Order::Bare => {}
            Order::Quit => return Ok(()),
        }
        peer.done();
    }
}

/// How many of the messages, which were all published before, arrive whole, in their order and once.
fn read<W: Wire>(subscriber: &mut Subscriber<W::Payload>, wire: &mut W, first: u64, count: u64) -> anyhow::Result<u64> {
    let (mut next, mut arrived) = (first, 0);
    loop {
        match subscriber.try_recv() {
            Ok(Some(message)) => {
                if let Some(number) = wire.read(&message).filter(|n| (next..first + count).contains(n)) {
                    arrived += 1;
                    next = number + 1;
                }
            }
            Ok(None) => return Ok(arrived),
            Err(RecvError::Lagged { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// What a line has beside the common figures.
#[derive(Serialize)]
struct Extra {
    batch: u32,
    subscribers: u32,
    burst: u64,
    /// The same with one subscriber attached.
    one_p50_ns: f64,
    ratio_one: f64,
}

fn report(stage: &Stage<'_>, args: &Args, burst: u64, chunks: &Chunks<Costs>) -> anyhow::Result<()> {
    let classes = by_class(chunks)?;
    let lines =
        classes.iter().map(|(class, of)| Line::new(stage, *class, of.len(), figures(of), extra(args, burst, of)));
    let lines: Vec<Line<Extra>> = lines.collect();
    if stage.json {
        return lines.iter().try_for_each(json_line).map_err(Into::into);
    }
    title(&format!("publish with {} subscribers attached", args.subscribers), &args.setup, stage.cores)?;
    let heads = ["CLASS", "CHUNKS", "NS A MESSAGE", "WITH ONE", "RATIO", "PINGPONG P50", "LOST"];
    let mut table = Table::new(&heads);
    for l in &lines {
        table.row([
            l.class.to_string(),
            l.chunks.to_string(),
            l.figures.p50_ns.map_or_else(String::new, |ns| format!("{ns:.1}")),
            format!("{:.1}", l.extra.one_p50_ns),
            times(l.extra.ratio_one),
            l.figures.bare_p50_ns.map_or_else(String::new, |ns| format!("{ns:.0}")),
            l.figures.lost.unwrap_or(0).to_string(),
        ]);
    }
    table.print()?;
    footnote(chunks.dropped)
}

fn figures(chunks: &[&Chunk<Costs>]) -> Figures {
    Figures {
        p50_ns: Some(rounded(median(chunks.iter().map(|c| c.sample.all_ns)), 100.0)),
        lost: Some(chunks.iter().map(|c| c.sample.lost).sum()),
        ..Figures::of_canary(chunks)
    }
}

fn extra(args: &Args, burst: u64, chunks: &[&Chunk<Costs>]) -> Extra {
    // The ratio of each chunk's two figures: what changes between chunks does not count.
    let ratio_one = median(chunks.iter().map(|c| c.sample.all_ns / c.sample.one_ns));
    Extra {
        batch: args.setup.batch,
        subscribers: args.subscribers,
        burst,
        one_p50_ns: rounded(median(chunks.iter().map(|c| c.sample.one_ns)), 100.0),
        ratio_one: rounded(ratio_one, 1000.0),
    }
}
