//! A traced process: run it to its marker, step it, run it to the n-th visit of a place, kill it.
//!
//! ptrace obeys only the thread that began it, so a [`Tracee`] stays on its thread. Whatever becomes of the test, the
//! kernel kills the tracee with its tracer.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::personality::{self, Persona};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::sleepers::Sleeper;

/// The marker: one byte, a trap that is delivered to the tracer.
pub(crate) const MARKER: u8 = 0xcc;

/// The instruction that enters the kernel.
const SYSTEM_CALL: [u8; 2] = [0x0f, 0x05];

/// How long a victim may take from one marker to the next when nobody steps it; for a machine that is very busy.
const SET_UP: Duration = Duration::from_secs(30);

/// How far a victim says that its operation has come.
static PROGRESS: AtomicU64 = AtomicU64::new(0);

/// In the victim: the operation has come so far.
pub(crate) fn reached(progress: u64) {
    // SeqCst: in program order for whoever reads it in a process that is stopped.
    PROGRESS.store(progress, Ordering::SeqCst);
}

/// Runs an operation between two markers. In the victim, and never to return: it is killed before or behind the second.
pub(crate) fn between_markers<R>(operation: impl FnOnce() -> R) -> ! {
    // SAFETY: a trap changes nothing; without a tracer it ends the process, which is only a victim. The tracer finds the
    // progress by the register.
    unsafe { std::arch::asm!("int3", in("rdi") PROGRESS.as_ptr()) };
    let outcome = operation();
    // SAFETY: as above.
    unsafe { std::arch::asm!("int3") };
    // Nothing is dropped and no system call made: the kernel is to find the process as the operation left it.
    let _kept = std::hint::black_box(outcome);
    loop {
        std::hint::spin_loop();
    }
}

/// A process of which one thread is stopped or run by this one.
pub(crate) struct Tracee {
    process: Pid,
    thread: Pid,
    /// Threads that the followed one has started: they stand still, so that only its own steps count.
    others: Vec<Pid>,
    memory: File,
    /// Where the victim's progress lies, once it has come to its marker.
    progress: u64,
    gone: bool,
}

/// Why a tracee is not running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A step was made or a trap met.
    Trap,
    /// It started another thread or process.
    Child(Pid),
    /// It began another program.
    Program,
    /// Another signal, which is to be delivered when it goes on.
    Signal(Signal),
    /// It has ended.
    Ended,
}

/// A place in a program that is the same in each process that runs it, wherever it was loaded.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Place {
    file: String,
    offset: u64,
}

impl Tracee {
    /// Starts a program that stops before its first instruction; addresses are the same in every run.
    pub(crate) fn spawn(mut command: Command) -> io::Result<Tracee> {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // SAFETY: between fork and exec only two system calls are made.
        unsafe {
            command.pre_exec(|| {
                personality::set(Persona::ADDR_NO_RANDOMIZE)?;
                Ok(ptrace::traceme()?)
            });
        }
        // It is waited for here, not by way of its `Child`.
        let pid = Pid::from_raw(command.spawn()?.id() as i32);
        let mut tracee = Tracee::of(pid)?;
        tracee.wait()?;
        ptrace::setoptions(pid, Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACECLONE)?;
        Ok(tracee)
    }

    /// Takes hold of a running process (its main thread) and stops it.
    pub(crate) fn seize(pid: Pid) -> io::Result<Tracee> {
        ptrace::seize(pid, Options::PTRACE_O_EXITKILL)?;
        let mut tracee = Tracee::of(pid)?;
        ptrace::interrupt(pid)?;
        tracee.wait()?;
        Ok(tracee)
    }

    /// Takes hold of a running process whose [next child](Self::next_child) is wanted, and lets it run.
    pub(crate) fn seize_parent(pid: Pid) -> io::Result<Tracee> {
        let tracee = Tracee::seize(pid)?;
        ptrace::setoptions(pid, Options::PTRACE_O_TRACEFORK)?;
        tracee.resume()?;
        Ok(tracee)
    }

    /// The next process that it starts, which stands where its program begins: its libraries are in place. The parent is let alone
    /// from then on.
    pub(crate) fn next_child(mut self, patience: Duration) -> io::Result<Tracee> {
        let child = loop {
            match self.wait_for(patience)? {
                Some(Stop::Child(child)) => break child,
                Some(Stop::Signal(signal)) => ptrace::cont(self.thread, signal)?,
                Some(Stop::Trap | Stop::Program) => self.resume()?,
                Some(Stop::Ended) | None => return Err(io::Error::other("the process starts no other one")),
            }
        };
        let mut child = Tracee::of(child)?;
        child.wait()?;
        ptrace::detach(self.process, None)?;
        self.gone = true;
        child.run_to_program(patience)?;
        Ok(child)
    }

    fn run_to_program(&mut self, patience: Duration) -> io::Result<()> {
        ptrace::setoptions(self.process, Options::PTRACE_O_EXITKILL | Options::PTRACE_O_TRACEEXEC)?;
        self.resume()?;
        loop {
            match self.wait()? {
                Stop::Program => break,
                Stop::Signal(signal) => ptrace::cont(self.thread, signal)?,
                Stop::Trap => self.resume()?,
                Stop::Child(_) | Stop::Ended => return Err(io::Error::other("it did not become another program")),
            }
        }
        ptrace::setoptions(self.process, Options::PTRACE_O_EXITKILL)?;
        self.memory = memory_of(self.process)?;
        let entry = entry_of(self.process)?;
        match self.run_to_address(entry, 1, patience)? {
            true => Ok(()),
            false => Err(io::Error::other("its program did not begin")),
        }
    }

    fn of(pid: Pid) -> io::Result<Tracee> {
        let memory = memory_of(pid)?;
        Ok(Tracee { process: pid, thread: pid, others: Vec::new(), memory, progress: 0, gone: false })
    }

    /// Runs it to where it enters the kernel next, if it does within `patience`; what it calls for is not done yet.
    pub(crate) fn run_to_call(&mut self, patience: Duration) -> io::Result<bool> {
        ptrace::syscall(self.thread, None)?;
        Ok(self.wait_for(patience)? == Some(Stop::Trap))
    }

    pub(crate) fn pid(&self) -> Pid {
        self.process
    }

    /// Its thread that is traced.
    pub(crate) fn sleeper(&self) -> Sleeper {
        Sleeper { process: self.process, thread: self.thread }
    }

    pub(crate) fn registers(&self) -> io::Result<libc::user_regs_struct> {
        Ok(ptrace::getregs(self.thread)?)
    }

    /// The bytes at an address, as many as there are.
    pub(crate) fn read(&self, address: u64, bytes: &mut [u8]) -> usize {
        self.memory.read_at(bytes, address).unwrap_or(0)
    }

    /// How far it says its operation has come.
    pub(crate) fn progress(&self) -> u64 {
        let mut bytes = [0; 8];
        self.read(self.progress, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Its mappings: range, offset in the file, file.
    pub(crate) fn mappings(&self) -> Vec<(std::ops::Range<u64>, u64, String)> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.thread)).unwrap_or_default();
        maps.lines().filter_map(mapping).collect()
    }

    /// Lets it run.
    pub(crate) fn resume(&self) -> io::Result<()> {
        Ok(ptrace::cont(self.thread, None)?)
    }

    /// Runs it until it stands behind a marker, which its set-up leads to: in the thread that libtest starts for it.
    pub(crate) fn run_to_marker(&mut self) -> io::Result<()> {
        self.run_to_next_marker()?;
        self.progress = self.registers()?.rdi;
        Ok(())
    }

    /// Runs it through its operation.
    pub(crate) fn run_to_end(&mut self) -> io::Result<()> {
        self.run_to_next_marker()
    }

    fn run_to_next_marker(&mut self) -> io::Result<()> {
        loop {
            self.resume()?;
            let stop = self.wait_for(SET_UP)?;
            match stop.ok_or_else(|| io::Error::other("the victim comes to no marker"))? {
                Stop::Trap => {
                    if self.is_behind_marker(&self.registers()?) {
                        return Ok(());
                    }
                }
                Stop::Child(thread) if self.thread != self.process => self.adopt(thread)?,
                Stop::Child(thread) => {
                    // The main thread only waits for it, with nothing to stop for.
                    self.resume()?;
                    self.thread = thread;
                    self.wait()?;
                }
                // A new thread under trace begins with this one.
                Stop::Signal(Signal::SIGSTOP) | Stop::Program => {}
                Stop::Signal(signal) => return Err(io::Error::other(format!("the victim got {signal} in its set-up"))),
                Stop::Ended => return Err(io::Error::other("the victim ended before its operation began")),
            }
        }
    }

    /// A thread that the followed one has started stands still.
    fn adopt(&mut self, thread: Pid) -> io::Result<()> {
        waitpid(thread, Some(WaitPidFlag::__WALL))?;
        self.others.push(thread);
        Ok(())
    }

    /// Executes one instruction.
    pub(crate) fn step(&mut self) -> io::Result<Stop> {
        ptrace::step(self.thread, None)?;
        loop {
            match self.wait()? {
                Stop::Signal(signal) => ptrace::step(self.thread, signal)?,
                Stop::Child(thread) => {
                    self.adopt(thread)?;
                    ptrace::step(self.thread, None)?;
                }
                stop => return Ok(stop),
            }
        }
    }

    /// Begins to execute an instruction, and leaves it alone with that.
    pub(crate) fn begin_step(&mut self) -> io::Result<()> {
        Ok(ptrace::step(self.thread, None)?)
    }

    /// Executes one instruction that may sleep; `None`: it sleeps for longer than `patience`, and goes on doing so.
    pub(crate) fn step_patiently(&mut self, patience: Duration) -> io::Result<Option<Stop>> {
        ptrace::step(self.thread, None)?;
        loop {
            match self.wait_for(patience)? {
                Some(Stop::Signal(signal)) => ptrace::step(self.thread, signal)?,
                Some(Stop::Child(thread)) => {
                    self.adopt(thread)?;
                    ptrace::step(self.thread, None)?;
                }
                stop => return Ok(stop),
            }
        }
    }

    /// Waits for the instruction that [`Self::step_patiently`] left asleep.
    pub(crate) fn step_on(&mut self, patience: Duration) -> io::Result<Option<Stop>> {
        self.wait_for(patience)
    }

    /// Runs until it is about to execute the instruction at `place` for the `visit`-th time (from 1); false: it did not
    /// within `patience`. Then it runs on.
    pub(crate) fn run_to(&mut self, place: &Place, visit: u64, patience: Duration) -> io::Result<bool> {
        let address = self.address_of(place).ok_or_else(|| io::Error::other(format!("{place:?} is not mapped")))?;
        self.run_to_address(address, visit, patience)
    }

    /// The same for an address.
    pub(crate) fn run_to_address(&mut self, address: u64, visit: u64, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        for _ in 1..visit {
            if !self.run_to_next(address, deadline)? {
                return Ok(false);
            }
            if self.step_patiently(deadline.saturating_duration_since(Instant::now()))? != Some(Stop::Trap) {
                return Ok(false);
            }
        }
        self.run_to_next(address, deadline)
    }

    /// [`Self::run_to`], instruction by instruction: it comes to see as much of the clock go by as when it was first stepped.
    /// False: it did not within `patience`, or it has come to its marker.
    pub(crate) fn step_to(&mut self, place: &Place, visit: u64, patience: Duration) -> io::Result<bool> {
        let address = self.address_of(place).ok_or_else(|| io::Error::other(format!("{place:?} is not mapped")))?;
        self.step_to_address(address, visit, patience)
    }

    /// The same for an address.
    pub(crate) fn step_to_address(&mut self, address: u64, visit: u64, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        let (mut visits, mut last) = (0, 0);
        while Instant::now() < deadline {
            let at = self.registers()?.rip;
            visits += u64::from(at == address && last != address);
            if visits == visit {
                return Ok(true);
            }
            let mut code = [0; 2];
            self.read(at, &mut code);
            let stop = match code {
                [MARKER, _] => return Ok(false),
                SYSTEM_CALL => self.step_patiently(deadline.saturating_duration_since(Instant::now()))?,
                _ => Some(self.step()?),
            };
            if stop != Some(Stop::Trap) {
                return Ok(false);
            }
            last = at;
        }
        Ok(false)
    }

    fn run_to_next(&mut self, address: u64, deadline: Instant) -> io::Result<bool> {
        let mut original = [0];
        self.read(address, &mut original);
        self.memory.write_all_at(&[MARKER], address)?;
        self.resume()?;
        while let Some(stop) = self.wait_for(deadline.saturating_duration_since(Instant::now()))? {
            match stop {
                Stop::Trap => {
                    let mut registers = self.registers()?;
                    if registers.rip == address + 1 {
                        registers.rip = address;
                        ptrace::setregs(self.thread, registers)?;
                        self.memory.write_all_at(&original, address)?;
                        return Ok(true);
                    }
                    // The operation is over, and it did not come by.
                    if self.is_behind_marker(&registers) {
                        return Ok(false);
                    }
                    self.resume()?;
                }
                Stop::Signal(signal) => ptrace::cont(self.thread, signal)?,
                Stop::Child(thread) => {
                    self.adopt(thread)?;
                    self.resume()?;
                }
                Stop::Program | Stop::Ended => return Ok(false),
            }
        }
        Ok(false)
    }

    fn is_behind_marker(&self, registers: &libc::user_regs_struct) -> bool {
        let mut byte = [0];
        self.read(registers.rip.wrapping_sub(1), &mut byte) == 1 && byte == [MARKER]
    }

    /// Where the instruction at an address comes from.
    pub(crate) fn place_of(&self, address: u64) -> Option<Place> {
        let (range, offset, file) = self.mappings().into_iter().find(|(range, ..)| range.contains(&address))?;
        Some(Place { file, offset: address - range.start + offset })
    }

    fn address_of(&self, place: &Place) -> Option<u64> {
        let inside = |(range, offset, file): &(std::ops::Range<u64>, u64, String)| {
            *file == place.file && (*offset..*offset + (range.end - range.start)).contains(&place.offset)
        };
        self.mappings().into_iter().find(inside).map(|(range, offset, _)| range.start + place.offset - offset)
    }

    /// Kills it and waits until it is dead.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if !self.gone {
            let _ = kill(self.process, Signal::SIGKILL);
            while !self.gone && self.wait().is_ok() {}
        }
        // With its last thread goes the process.
        for other in self.others.drain(..) {
            while !matches!(
                waitpid(other, Some(WaitPidFlag::__WALL)),
                Err(_) | Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))
            ) {}
        }
        if self.thread != self.process {
            self.thread = self.process;
            self.gone = false;
            while !self.gone && self.wait().is_ok() {}
        }
    }

    fn wait(&mut self) -> io::Result<Stop> {
        let status = waitpid(self.thread, Some(WaitPidFlag::__WALL));
        Ok(self.note(status)?.unwrap_or(Stop::Trap))
    }

    fn wait_for(&mut self, patience: Duration) -> io::Result<Option<Stop>> {
        let deadline = Instant::now() + patience;
        for look in 0u32.. {
            let status = waitpid(self.thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG));
            if let Some(stop) = self.note(status)? {
                return Ok(Some(stop));
            }
            if Instant::now() >= deadline {
                break;
            }
            // Most waits are those of a single instruction; for what sleeps itself it is looked ever more rarely.
            if look > 100 {
                thread::sleep(Duration::from_micros(u64::from(look / 2).min(1000)));
            }
        }
        Ok(None)
    }

    fn note(&mut self, status: nix::Result<WaitStatus>) -> io::Result<Option<Stop>> {
        match status {
            Ok(WaitStatus::StillAlive) => Ok(None),
            Ok(WaitStatus::PtraceEvent(pid, _, libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK)) => {
                Ok(Some(Stop::Child(Pid::from_raw(ptrace::getevent(pid)? as i32))))
            }
            Ok(WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC)) => Ok(Some(Stop::Program)),
            Ok(WaitStatus::Stopped(_, Signal::SIGTRAP) | WaitStatus::PtraceEvent(..)) => Ok(Some(Stop::Trap)),
            Ok(WaitStatus::Stopped(_, signal)) => Ok(Some(Stop::Signal(signal))),
            Err(Errno::EINTR) => Ok(None),
            Ok(_) => {
                self.gone = true;
                Ok(Some(Stop::Ended))
            }
            Err(error) => {
                self.gone = true;
                Err(error.into())
            }
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        self.end();
    }
}

/// Why processes cannot be traced here, if so.
pub(crate) fn forbidden() -> Option<String> {
    let tried = Tracee::spawn(Command::new("true"));
    if let Err(error) = tried {
        return Some(format!("a child cannot be traced: {error}"));
    }
    let mut other = Command::new("sleep").arg("60").spawn().ok()?;
    let tried = Tracee::seize(Pid::from_raw(other.id() as i32));
    let _ = other.kill();
    let forbidden = tried.err().map(|error| format!("a running process cannot be traced: {error}"));
    let _ = other.wait();
    forbidden
}

fn memory_of(pid: Pid) -> io::Result<File> {
    File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))
}

/// Where the program begins that a process has just become, by what the kernel told it.
fn entry_of(pid: Pid) -> io::Result<u64> {
    let told = fs::read(format!("/proc/{pid}/auxv"))?;
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let entry = told.chunks_exact(16).find(|pair| word(&pair[..8]) == libc::AT_ENTRY);
    entry.map(|pair| word(&pair[8..])).ok_or_else(|| io::Error::other("the kernel does not say where it begins"))
}

fn mapping(line: &str) -> Option<(std::ops::Range<u64>, u64, String)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let offset = number(fields.nth(1)?)?;
    Some((number(start)?..number(end)?, offset, fields.skip(2).collect::<Vec<_>>().join(" ")))
}
