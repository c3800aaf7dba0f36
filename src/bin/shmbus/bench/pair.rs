//! Two processes that measure together: a page of shared control lines, orders, pinning, and the watch over each other.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use crossbeam_utils::CachePadded;
use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Pid, getppid};

use super::Stage;
use super::args::{PeerArgs, Task};
use super::clock::Clock;
use crate::sandbox::Minder;
use crate::signals;

/// How often (in polls) a spinning process looks whether the other is still there: every few milliseconds.
const LOOK_POLLS: u32 = 1 << 16;

/// How long the other process may take to attach.
const START_LIMIT: Duration = Duration::from_secs(10);

const REGION_BYTES: usize = 4096;

/// The shared region. Every word is a line of its own, all zero at first.
#[repr(C)]
pub(super) struct Lines {
    /// The canary's two lines.
    pub(super) ping: CachePadded<AtomicU64>,
    pub(super) pong: CachePadded<AtomicU64>,
    /// Number of the order in force << 8 | what it is; stored after its arguments.
    order: CachePadded<AtomicU64>,
    count: CachePadded<AtomicU64>,
    first: CachePadded<AtomicU64>,
    /// Number of the last order that the peer has carried out, plus 1 (1: it is attached).
    done: CachePadded<AtomicU64>,
    /// Number of the last order for which everything was sent.
    pub(super) sent: CachePadded<AtomicU64>,
    /// Messages missing or garbled in the last order.
    pub(super) lost: CachePadded<AtomicU64>,
    /// Messages that the peer acknowledged in the last order, and the sum of their numbers (queues).
    pub(super) arrived: CachePadded<AtomicU64>,
    pub(super) sum: CachePadded<AtomicU64>,
    /// The word that both processes swap (bare, fan-in).
    pub(super) swapped: CachePadded<AtomicU64>,
    /// What a bare sleeper sleeps on, and when the other process was last woken (wakes).
    pub(super) bell: CachePadded<AtomicU32>,
    pub(super) woken_ns: CachePadded<AtomicU64>,
}

const _: () = assert!(size_of::<Lines>() <= REGION_BYTES);

/// What the peer is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    Canary = 1,
    Bus = 2,
    /// What the workload has to compare the bus with, other than the canary.
    Bare = 3,
    Quit = 4,
}

/// The mapped region.
struct Region(MmapRaw);

impl Region {
    fn map(file: &File) -> anyhow::Result<Region> {
        Ok(Region(MmapOptions::new().len(REGION_BYTES).map_raw(file).context("cannot map the control region")?))
    }

    fn lines(&self) -> &Lines {
        // SAFETY: the mapping is page aligned, longer than `Lines`, lives as long as `self`, and `Lines` is made of
        // atomics, for which every bit pattern is valid and which both processes access only as atomics.
        unsafe { &*self.0.as_ptr().cast::<Lines>() }
    }
}

/// The measuring side: owns the other process.
pub(super) struct Pair {
    region: Region,
    child: RefCell<Minder>,
    orders: u64,
    pub(super) clock: Clock,
    /// The canary's last median; sizes the next chunks.
    pub(super) bare_p50_ns: f64,
    /// Reused by every chunk.
    pub(super) stamps: Vec<u64>,
}

impl Pair {
    /// Starts the other process on `cores[1]`, moves to `cores[0]` and waits until both are attached to the bus.
    pub(super) fn start(stage: &Stage<'_>) -> anyhow::Result<Pair> {
        Pair::start_with(stage, Stdio::null())
    }

    /// The same with something on the other process's standard input.
    pub(super) fn start_with(stage: &Stage<'_>, stdin: Stdio) -> anyhow::Result<Pair> {
        let file = File::from(memfd_create("shmbus-bench", MFdFlags::MFD_CLOEXEC).context("cannot make a memfd")?);
        file.set_len(REGION_BYTES as u64)?;
        let inherited = file.try_clone()?;
        fcntl(&inherited, FcntlArg::F_SETFD(FdFlag::empty()))?;
        let arguments = peer_arguments(stage.task, stage.cores, inherited.as_raw_fd());
        let child = stage.sandbox.command(arguments)?.stdin(stdin).stdout(Stdio::null()).spawn()?;
        drop(inherited);
        let pair = Pair {
            region: Region::map(&file)?,
            child: RefCell::new(Minder(child)),
            orders: 0,
            clock: Clock::calibrate(),
            bare_p50_ns: 500.0,
            stamps: Vec::new(),
        };
        let deadline = Instant::now() + START_LIMIT;
        while pair.lines().done.load(Ordering::Acquire) != 1 {
            pair.check()?;
            ensure!(Instant::now() < deadline, "the other process did not attach within {START_LIMIT:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        pin(&stage.cores[..1])?;
        Ok(pair)
    }

    pub(super) fn lines(&self) -> &Lines {
        self.region.lines()
    }

    pub(super) fn peer_pid(&self) -> Pid {
        self.child.borrow().pid()
    }

    /// Tells the peer what comes next.
    pub(super) fn begin(&mut self, order: Order, count: u64, first: u64) {
        self.orders += 1;
        let lines = self.lines();
        lines.count.store(count, Ordering::Relaxed);
        lines.first.store(first, Ordering::Relaxed);
        lines.order.store(self.orders << 8 | order as u64, Ordering::Release);
    }

    /// Says that all messages of the order are published.
    pub(super) fn all_sent(&self) {
        self.lines().sent.store(self.orders, Ordering::Release);
    }

    /// Waits until the peer has carried the order out.
    pub(super) fn finish(&self) -> anyhow::Result<()> {
        self.spin_until(|lines| lines.done.load(Ordering::Acquire) > self.orders)
    }

    /// Spins; gives up when the peer dies or Ctrl-C comes.
    #[inline]
    pub(super) fn spin_until(&self, ready: impl FnMut(&Lines) -> bool) -> anyhow::Result<()> {
        spin(self.lines(), ready, || self.check())
    }

    /// Whether it makes sense to go on.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        check_signals()?;
        match self.child.borrow_mut().0.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the other process of the measurement ended early: {status}"),
        }
    }
}

impl Drop for Pair {
    /// A peer that is still there ends by itself; one that does not is killed by its minder.
    fn drop(&mut self) {
        self.begin(Order::Quit, 0, 0);
        let deadline = Instant::now() + Duration::from_secs(1);
        while matches!(self.child.borrow_mut().0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The other side.
pub(super) struct Peer {
    region: Region,
    parent: Pid,
    /// The first end's core, and ours.
    cores: [usize; 2],
    seen: u64,
}

/// An order as the peer received it.
pub(super) struct Received {
    pub(super) order: Order,
    pub(super) count: u64,
    pub(super) first: u64,
}

impl Peer {
    /// Joins the measurement; the bus handles are open by now.
    pub(super) fn attach(args: &PeerArgs) -> anyhow::Result<Peer> {
        // SAFETY: the starting process left this descriptor open for us under this number; nothing else here owns it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(args.control_fd) });
        ensure!(file.metadata()?.len() == REGION_BYTES as u64, "descriptor {} is no control region", args.control_fd);
        let cores = args.task.setup.run.cores.context("the peer needs --cores")?;
        let peer = Peer { region: Region::map(&file)?, parent: getppid(), cores, seen: 0 };
        peer.stay()?;
        peer.lines().done.store(1, Ordering::Release);
        Ok(peer)
    }

    pub(super) fn lines(&self) -> &Lines {
        self.region.lines()
    }

    /// Runs on its own core alone, as from the beginning.
    pub(super) fn stay(&self) -> anyhow::Result<()> {
        pin(&self.cores[1..])
    }

    /// Runs on either core, whichever the kernel chooses.
    pub(super) fn roam(&self) -> anyhow::Result<()> {
        pin(&self.cores)
    }

    /// Waits for the next order.
    pub(super) fn next(&mut self) -> anyhow::Result<Received> {
        let seen = self.seen;
        self.spin_until(|lines| lines.order.load(Ordering::Acquire) >> 8 != seen)?;
        let lines = self.region.lines();
        let word = lines.order.load(Ordering::Acquire);
        self.seen = word >> 8;
        let order = match word & 0xff {
            1 => Order::Canary,
            2 => Order::Bus,
            3 => Order::Bare,
            _ => Order::Quit,
        };
        Ok(Received { order, count: lines.count.load(Ordering::Relaxed), first: lines.first.load(Ordering::Relaxed) })
    }

    /// Says that the order is carried out.
    pub(super) fn done(&self) {
        self.lines().done.store(self.seen + 1, Ordering::Release);
    }

    /// Whether everything of the order in hand has been published.
    pub(super) fn all_sent(&self) -> bool {
        self.lines().sent.load(Ordering::Acquire) == self.seen
    }

    #[inline]
    pub(super) fn spin_until(&self, ready: impl FnMut(&Lines) -> bool) -> anyhow::Result<()> {
        spin(self.lines(), ready, || self.check())
    }

    pub(super) fn check(&self) -> anyhow::Result<()> {
        ensure!(getppid() == self.parent, "the measuring process is gone");
        Ok(())
    }
}

/// Whether nobody has asked this process to end.
pub(super) fn check_signals() -> anyhow::Result<()> {
    ensure!(signals::caught().is_none(), "ended by a signal");
    Ok(())
}

/// One PAUSE a poll, and now and then a look around.
#[inline]
pub(super) fn spin(
    lines: &Lines,
    mut ready: impl FnMut(&Lines) -> bool,
    check: impl Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut polls: u32 = 0;
    while !ready(lines) {
        polls = polls.wrapping_add(1);
        if polls.is_multiple_of(LOOK_POLLS) {
            check()?;
        }
        std::hint::spin_loop();
    }
    Ok(())
}

/// The command line of the other process.
fn peer_arguments(task: &Task, cores: [usize; 2], control_fd: i32) -> Vec<String> {
    let Task { workload, setup, subscribers } = task;
    let mode = shmbus::Mode::from(setup.mode);
    let mut arguments = format!(
        "bench peer {workload} --control-fd {control_fd} --size {} --mode {mode} --batch {} --cores {},{} \
         --subscribers {subscribers}",
        setup.size, setup.batch, cores[0], cores[1]
    );
    if let Some(ring) = setup.ring {
        arguments += &format!(" --ring {ring}");
    }
    arguments.split(' ').map(str::to_owned).collect()
}

/// The cores asked for, else the first that we may use and the first after it that is not its SMT sibling.
pub(super) fn choose_cores(asked: Option<[usize; 2]>) -> anyhow::Result<[usize; 2]> {
    if let Some(cores) = asked {
        return Ok(cores);
    }
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let usable: Vec<usize> = (0..CpuSet::count()).filter(|&core| allowed.is_set(core).unwrap_or(false)).collect();
    ensure!(usable.len() >= 2, "a bench needs two cores; this process may use {}", usable.len());
    let siblings = format!("/sys/devices/system/cpu/cpu{}/topology/core_cpus_list", usable[0]);
    let siblings = std::fs::read_to_string(siblings).unwrap_or_default();
    let is_sibling = |core: usize| siblings.trim().split([',', '-']).any(|s| s.parse() == Ok(core));
    let second = usable[1..].iter().copied().find(|&core| !is_sibling(core)).unwrap_or(usable[1]);
    Ok([usable[0], second])
}

fn pin(cores: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    for &core in cores {
        set.set(core)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on core {cores:?}"))
}
