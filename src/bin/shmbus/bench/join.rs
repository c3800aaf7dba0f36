//! What a connected process waits for a handle, beside a bare hand-over of as much memory.

use std::io::{IoSlice, IoSliceMut, Write as _};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use indicatif::ProgressBar;
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use shmbus::{Bus, Topic};

use super::args::{Run, Setup};
use super::canary::Quantiles;
use super::line::{Figures, LATENCY_HEADS, Line};
use super::pair::{Order, Pair, Peer, check_signals};
use super::report::{by_class, footnote_of_all, median, rounded, title_of};
use super::{Chunk, Chunks, Stage, THERE, canary, interleave};
use crate::output::{self, Table, grouped, json_line};
use crate::values::{self, ModeArg};

/// Openings of each kind in a chunk: some milliseconds.
const ROUNDS: usize = 3;

/// What the measuring process writes to the socket: for the descriptor, and at a chunk's end.
const HAND_OVER: u8 = b'h';
const ENOUGH: u8 = b'e';

const GONE: &str = "the other process hands nothing over any more";

/// Where the other process has its end of the socket.
const STANDARD_INPUT: i32 = 0;

/// How the openings are called.
const HANDLES: [&str; 3] = ["subscriber", "publisher", "bus and subscriber"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Payload bytes that the topic holds
    #[arg(long, value_name = "BYTES", default_value = "1M", value_parser = parse_bytes)]
    bytes: u64,
    /// Other topics that are there: channels that nobody uses, with one segment each, so that 10,000 of them fit under
    /// common limits of open files
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=15_000))]
    topics: u64,
    #[command(flatten)]
    run: Run,
}

/// As many bytes as the topic may hold.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let most = 1 << 30;
    match values::positive_size(text)? {
        bytes if bytes <= most => Ok(bytes),
        bytes => Err(format!("{bytes} bytes are asked for; at most {most} are measured")),
    }
}

impl Args {
    /// Of this only the time and the cores count: there are no messages.
    pub(super) fn setup(&self) -> Setup {
        Setup { size: 64, mode: ModeArg::Many, batch: 1, ring: None, run: self.run.clone() }
    }

    fn topic(&self) -> Topic<[u8]> {
        Topic::named(THERE).bytes(self.bytes)
    }
}

/// One chunk's openings, in nanoseconds.
#[derive(Default)]
struct Joins {
    /// In the order of [`HANDLES`].
    ours: [Vec<u64>; 3],
    bare: Vec<u64>,
}

pub(super) fn run(stage: &Stage<'_>, args: &Args) -> anyhow::Result<()> {
    stage.bus.create(&args.topic())?;
    create_others(stage.bus, args.topics)?;
    // Its arena is what a subscriber maps; and the second one, which is measured, stays from one opening to the next.
    let _publisher = stage.bus.publisher(args.topic())?;
    let (socket, theirs) = UnixStream::pair()?;
    let pair = Pair::start_with(stage, OwnedFd::from(theirs).into())?;
    let chunks = measure(stage, args, pair, &socket)?;
    report(stage, args, &chunks)
}

fn create_others(bus: &Bus, count: u64) -> anyhow::Result<()> {
    let progress = ProgressBar::new(count);
    for number in 0..count {
        check_signals()?;
        let topic = Topic::<[u8]>::named(format!("bench.other.{number}")).channel().messages(1).bytes(8);
        bus.create(&topic).with_context(|| format!("there is no room for {count} topics, only for {number}"))?;
        progress.set_position(number);
    }
    progress.finish_and_clear();
    Ok(())
}

fn measure(stage: &Stage<'_>, args: &Args, mut pair: Pair, socket: &UnixStream) -> anyhow::Result<Chunks<Joins>> {
    interleave(&mut pair, args.run.seconds, |pair| {
        let mut joins = Joins::default();
        // The other process sleeps on the socket meanwhile: the coordinator needs a core, too.
        pair.begin(Order::Bus, args.bytes, 0);
        // The first one, which does not count, finds it on its way there.
        take_over(socket, args.bytes as usize)?;
        for _ in 0..ROUNDS {
            pair.check()?;
            joins.bare.push(take_over(socket, args.bytes as usize)?);
            let [subscriber, publisher, both] = &mut joins.ours;
            subscriber.push(timed(|| Ok(stage.bus.subscriber(args.topic()).open()?))?);
            settle(stage.bus)?;
            publisher.push(timed(|| Ok(stage.bus.publisher(args.topic())?))?);
            settle(stage.bus)?;
            both.push(timed(|| Ok(stage.sandbox.open()?.subscriber(args.topic()).open()?))?);
            settle(stage.bus)?;
        }
        (&*socket).write_all(&[ENOUGH])?;
        pair.finish()?;
        Ok(joins)
    })
}

/// Nanoseconds until `open` has returned; what it opened is closed afterwards.
fn timed<T>(open: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<u64> {
    let started = Instant::now();
    let opened = open()?;
    let ns = started.elapsed().as_nanos() as u64;
    drop(opened);
    Ok(ns)
}

/// Waits until the coordinator has closed what was given back: it answers in order.
fn settle(bus: &Bus) -> anyhow::Result<()> {
    bus.topic(THERE)?;
    Ok(())
}

/// Nanoseconds from asking for a descriptor until its memory is mapped and read.
fn take_over(socket: &UnixStream, len: usize) -> anyhow::Result<u64> {
    let started = Instant::now();
    let mut socket = socket;
    socket.write_all(&[HAND_OVER]).context(GONE)?;
    let fd = receive_descriptor(socket).context(GONE)?;
    // As the bus maps segments.
    let map = MmapOptions::new().len(len).populate().map_raw_read_only(&fd)?;
    // SAFETY: the mapping is at least one byte long; the other process changes nothing in it any more.
    std::hint::black_box(unsafe { map.as_ptr().read_volatile() });
    Ok(started.elapsed().as_nanos() as u64)
}

fn receive_descriptor(socket: &UnixStream) -> anyhow::Result<OwnedFd> {
    let mut byte = [0];
    let mut pieces = [IoSliceMut::new(&mut byte)];
    let mut control = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let [fd] = fds[..]
        {
            // SAFETY: the kernel has just put this descriptor into our table for this message; nobody else knows of it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    anyhow::bail!("the other process handed over no descriptor")
}

/// The other process: hands over a descriptor whenever it is asked for.
pub(super) fn answer(mut peer: Peer) -> anyhow::Result<()> {
    let mut memory = None;
    loop {
        let received = peer.next()?;
        match received.order {
            Order::Canary => canary::answer(&peer, received.count)?,
            Order::Bus => {
                let memory = match &mut memory {
                    Some(memory) => memory,
                    none => none.insert(memory_of(received.count)?),
                };
                // As free to choose a core as the coordinator is.
                peer.roam()?;
                while hand_over(memory)? {}
                peer.stay()?;
            }
            Order::Bare => {}
            Order::Quit => return Ok(()),
        }
        peer.done();
    }
}

/// A memfd whose pages are all there.
fn memory_of(len: u64) -> anyhow::Result<OwnedFd> {
    let fd = memfd_create("shmbus-bench", MFdFlags::MFD_CLOEXEC).context("cannot make a memfd")?;
    let file = std::fs::File::from(fd);
    file.set_len(len)?;
    let map = MmapRaw::map_raw(&file).context("cannot map the memfd")?;
    for offset in (0..map.len()).step_by(4096) {
        // SAFETY: inside the mapping, which nobody else has yet.
        unsafe { map.as_mut_ptr().add(offset).write_volatile(1) };
    }
    Ok(file.into())
}

/// Waits to be asked; `false`: it was for the last time.
fn hand_over(memory: &OwnedFd) -> anyhow::Result<bool> {
    let mut asked = [0];
    let len = nix::sys::socket::recv(STANDARD_INPUT, &mut asked, MsgFlags::empty())?;
    ensure!(len == 1, "the measuring process is gone");
    if asked[0] != HAND_OVER {
        return Ok(false);
    }
    let fds = [memory.as_raw_fd()];
    sendmsg::<()>(
        STANDARD_INPUT,
        &[IoSlice::new(&asked)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(true)
}

/// What a line has beside the common figures.
#[derive(Serialize)]
struct Extra {
    handle: &'static str,
    topic_bytes: u64,
    topics: u64,
    /// Openings of this kind; as many hand-overs were bare.
    joins: usize,
    canary_p50_ns: f64,
}

fn report(stage: &Stage<'_>, args: &Args, chunks: &Chunks<Joins>) -> anyhow::Result<()> {
    let classes = by_class(chunks)?;
    let kinds = classes.iter().flat_map(|(class, of)| (0..HANDLES.len()).map(move |kind| (*class, kind, of)));
    let lines = kinds.map(|(class, kind, of)| {
        Line::new(stage, class, of.len(), figures(kind, of), extra(args, kind, of)).without_payload()
    });
    let lines: Vec<Line<Extra>> = lines.collect();
    if stage.json {
        return lines.iter().try_for_each(json_line).map_err(Into::into);
    }
    let (bytes, others) = (output::bytes(args.bytes), grouped(args.topics));
    title_of(format_args!("joins: a topic for many of {bytes}, other topics: {others}"), stage.cores)?;
    let mut table = Table::new(&[&["HANDLE", "CLASS", "JOINS"], &LATENCY_HEADS[..], &["PINGPONG NS"]].concat());
    for l in &lines {
        let cells = [l.extra.handle.to_owned(), l.class.to_string(), l.extra.joins.to_string()].into_iter();
        table.row(cells.chain(l.figures.latency_cells()).chain([format!("{:.0}", l.extra.canary_p50_ns)]));
    }
    table.print()?;
    footnote_of_all("a descriptor of as many bytes handed over, mapped and read", chunks.dropped)
}

fn figures(kind: usize, chunks: &[&Chunk<Joins>]) -> Figures {
    let ours = Quantiles::of_ns(chunks.iter().flat_map(|c| &c.sample.ours[kind]));
    let bare = Quantiles::of_ns(chunks.iter().flat_map(|c| &c.sample.bare));
    Figures::of_latencies(&ours, &bare)
}

fn extra(args: &Args, kind: usize, chunks: &[&Chunk<Joins>]) -> Extra {
    Extra {
        handle: HANDLES[kind],
        topic_bytes: args.bytes,
        topics: args.topics,
        joins: chunks.iter().map(|c| c.sample.ours[kind].len()).sum(),
        canary_p50_ns: rounded(median(chunks.iter().map(|c| c.bare.0.p50_ns)), 10.0),
    }
}
