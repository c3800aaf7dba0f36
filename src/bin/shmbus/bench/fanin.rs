//! Two publishers on one ordered topic for many, and a subscriber that checks what they published.
//!
//! Both processes publish half a ring each at the same time, which counts; then the subscriber in this one reads it, which
//! does not: two publishers that spin leave it no core.

use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::ensure;
use serde::Serialize;
use shmbus::{Publisher, RecvError, Subscriber, Wait};

use super::args::{Run, Setup};
use super::line::{Figures, Line};
use super::pair::{Order, Pair, Peer};
use super::report::{by_class, footnote, median, rounded, title};
use super::stream::Memcpy;
use super::wire::Wire;
use super::{Chunk, Chunks, Stage, THERE, canary, interleave, stream};
use crate::output::{Table, grouped, json_line, times};
use crate::values::{self, ModeArg};

/// Messages the ring holds unless `--ring` says otherwise: a chunk is that many.
const RING: u64 = 32_768;

/// Bare swaps of each process in a chunk: a millisecond or so.
const SWAPS: u64 = 10_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Payload bytes, 8 or more; 64 means 56 bytes of payload, as for the other workloads
    #[arg(long, value_name = "BYTES", default_value = "64", value_parser = values::size)]
    size: u64,
    /// Publishers, each on a core of its own: 1 or 2
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=2))]
    publishers: u32,
    /// Messages a publish
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: u32,
    /// Messages the ring holds; a chunk publishes as many, or as fit in 4 MiB [default: 32768]
    #[arg(long, value_name = "N")]
    ring: Option<u64>,
    #[command(flatten)]
    run: Run,
}

impl Args {
    pub(super) fn setup(&self) -> Setup {
        let ring = Some(self.ring.unwrap_or(RING));
        Setup { size: self.size, mode: ModeArg::Many, batch: self.batch, ring, run: self.run.clone() }
    }
}

/// One chunk's figures.
struct Flow {
    messages_per_s: f64,
    bare_swaps_per_s: f64,
    bare_bytes_per_s: f64,
    lost: u64,
}

/// What each publisher publishes in a chunk.
#[derive(Clone, Copy)]
struct Shares {
    publishers: u64,
    messages: u64,
}

impl Shares {
    fn of(setup: &Setup, publishers: u32) -> anyhow::Result<Shares> {
        let (most, batch) = (setup.held() / 2, u64::from(setup.batch));
        let messages = most / batch * batch;
        ensure!(messages > 0, "half of what the ring holds is {most} messages, less than a --batch of {batch}");
        Ok(Shares { publishers: publishers.into(), messages })
    }

    /// What the publisher in the other process has of `all`.
    fn theirs(self, all: u64) -> u64 {
        if self.publishers == 2 { all } else { 0 }
    }
}

pub(super) fn run<W: Wire>(stage: &Stage<'_>, wire: W, args: &Args) -> anyhow::Result<()> {
    let setup = &stage.task.setup;
    let shares = Shares::of(setup, args.publishers)?;
    let topic = || setup.topic::<W::Payload>(THERE);
    stage.bus.create(&topic())?;
    let publisher = stage.bus.publisher(topic())?.wait(Wait::Spin);
    let subscriber = stage.bus.subscriber(topic()).wait(Wait::Spin).open()?;
    let pair = Pair::start(stage)?;
    let (chunks, lost) = measure(publisher, subscriber, wire, pair, setup, shares)?;
    report(stage, args, &chunks)?;
    ensure!(lost == 0, "{lost} messages did not reach the subscriber whole and in their publisher's order");
    Ok(())
}

/// The chunks, and how many messages were lost in all.
fn measure<W: Wire>(
    mut publisher: Publisher<W::Payload>,
    mut subscriber: Subscriber<W::Payload>,
    mut wire: W,
    mut pair: Pair,
    setup: &Setup,
    shares: Shares,
) -> anyhow::Result<(Chunks<Flow>, u64)> {
    let mut copy = Memcpy::new(setup.payload_bytes());
    let (mut number, mut lost_in_all) = (0, 0);
    let share = shares.messages;
    let chunks = interleave(&mut pair, setup.run.seconds, |pair| {
        let bare_swaps_per_s = swaps_per_s(pair, shares)?;
        pair.begin(Order::Bus, shares.theirs(share), number + share);
        let started = pair.clock.ticks();
        stream::send(&mut publisher, &mut wire, number, share, setup.batch.into())?;
        pair.finish()?;
        let ns = pair.clock.ns(pair.clock.ticks() - started);
        let count = share * shares.publishers;
        let lost = count - read_back(&mut subscriber, &mut wire, number, shares)?;
        lost_in_all += lost;
        number += count;
        let bare_bytes_per_s = copy.bytes_per_s(&pair.clock);
        Ok(Flow { messages_per_s: count as f64 * 1e9 / ns, bare_swaps_per_s, bare_bytes_per_s, lost })
    })?;
    Ok((chunks, lost_in_all))
}

/// The bare limit of a total order: as many processes as publish swap one word.
fn swaps_per_s(pair: &mut Pair, shares: Shares) -> anyhow::Result<f64> {
    pair.begin(Order::Bare, shares.theirs(SWAPS), 0);
    let started = pair.clock.ticks();
    swap(&pair.lines().swapped, SWAPS);
    pair.finish()?;
    let ns = pair.clock.ns(pair.clock.ticks() - started);
    Ok((SWAPS * shares.publishers) as f64 * 1e9 / ns)
}

/// Claims the word's next values, as publishers claim places.
fn swap(word: &AtomicU64, count: u64) {
    for _ in 0..count {
        let mut seen = word.load(Ordering::Relaxed);
        while let Err(now) = word.compare_exchange_weak(seen, seen + 1, Ordering::AcqRel, Ordering::Relaxed) {
            seen = now;
        }
    }
}

/// How many of the chunk's messages arrive whole, once, and in their publisher's order. All were published before.
fn read_back<W: Wire>(
    subscriber: &mut Subscriber<W::Payload>,
    wire: &mut W,
    first: u64,
    shares: Shares,
) -> anyhow::Result<u64> {
    let ends: Vec<u64> = (1..=shares.publishers).map(|publisher| first + publisher * shares.messages).collect();
    let mut next: Vec<u64> = ends.iter().map(|end| end - shares.messages).collect();
    let mut arrived = 0;
    loop {
        match subscriber.try_recv() {
            Ok(Some(message)) => {
                let Some(number) = wire.read(&message) else { continue };
                let publisher = ends.iter().position(|end| number < *end);
                if let Some(publisher) = publisher.filter(|&publisher| number >= next[publisher]) {
                    arrived += 1;
                    next[publisher] = number + 1;
                }
            }
            Ok(None) => return Ok(arrived),
            Err(RecvError::Lagged { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The other process: the second publisher.
pub(super) fn answer<W: Wire>(
    mut publisher: Publisher<W::Payload>,
    mut wire: W,
    batch: u32,
    mut peer: Peer,
) -> anyhow::Result<()> {
    loop {
        let received = peer.next()?;
        match received.order {
            Order::Canary => canary::answer(&peer, received.count)?,
            Order::Bus => stream::send(&mut publisher, &mut wire, received.first, received.count, batch.into())?,
            Order::Bare => swap(&peer.lines().swapped, received.count),
            Order::Quit => return Ok(()),
        }
        peer.done();
    }
}

/// What a line has beside the common figures.
#[derive(Serialize)]
struct Extra {
    batch: u32,
    publishers: u32,
    bare_swaps_per_s: f64,
    /// Publishes (of a batch each) over bare swaps.
    ratio_swaps: f64,
}

fn report(stage: &Stage<'_>, args: &Args, chunks: &Chunks<Flow>) -> anyhow::Result<()> {
    let setup = &stage.task.setup;
    let classes = by_class(chunks)?;
    let line = |(class, of): &(_, Vec<_>)| Line::new(stage, *class, of.len(), figures(setup, of), extra(args, of));
    let lines: Vec<Line<Extra>> = classes.iter().map(line).collect();
    if stage.json {
        return lines.iter().try_for_each(json_line).map_err(Into::into);
    }
    title(&format!("fan-in, publishers: {}", args.publishers), setup, stage.cores)?;
    let heads = ["CLASS", "CHUNKS", "MSG/S", "BARE SWAPS/S", "PUBLISHES/SWAPS", "PINGPONG P50", "LOST"];
    let mut table = Table::new(&heads);
    for l in &lines {
        table.row([
            l.class.to_string(),
            l.chunks.to_string(),
            grouped(l.figures.messages_per_s.unwrap_or(0.0) as u64),
            grouped(l.extra.bare_swaps_per_s as u64),
            times(l.extra.ratio_swaps),
            format!("{:.0}", l.figures.bare_p50_ns.unwrap_or(f64::NAN)),
            l.figures.lost.unwrap_or(0).to_string(),
        ]);
    }
    table.print()?;
    footnote(chunks.dropped)
}

fn figures(setup: &Setup, chunks: &[&Chunk<Flow>]) -> Figures {
    let messages_per_s = median(chunks.iter().map(|c| c.sample.messages_per_s)).round();
    Figures {
        bare_p50_ns: Figures::of_canary(chunks).bare_p50_ns,
        messages_per_s: Some(messages_per_s),
        bytes_per_s: Some(messages_per_s * setup.payload_bytes() as f64),
        bare_bytes_per_s: Some(median(chunks.iter().map(|c| c.sample.bare_bytes_per_s)).round()),
        lost: Some(chunks.iter().map(|c| c.sample.lost).sum()),
        ..Figures::default()
    }
}

fn extra(args: &Args, chunks: &[&Chunk<Flow>]) -> Extra {
    let publishes = |c: &Chunk<Flow>| c.sample.messages_per_s / f64::from(args.batch);
    Extra {
        batch: args.batch,
        publishers: args.publishers,
        bare_swaps_per_s: median(chunks.iter().map(|c| c.sample.bare_swaps_per_s)).round(),
        ratio_swaps: rounded(median(chunks.iter().map(|c| publishes(c) / c.sample.bare_swaps_per_s)), 1000.0),
    }
}
