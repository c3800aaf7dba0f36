//! What the tests of the library share: a bus of their own, other processes, deadlines, payloads that check themselves.
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod feeding;

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::{Bus, BusOptions, Mode, OpenError, Payload, Publisher, Refusal, Subscriber, Topic};

/// Everything here happens within milliseconds; this is for a machine that is very busy.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Names the role that a test binary started by another one plays.
const ROLE: &str = "SHMBUS_TEST_ROLE";

/// Names the topic of a role and whatever else it must know.
const ARGUMENTS: &str = "SHMBUS_TEST_ARGUMENTS";

/// Starts every line that a role has for its test; everything else on standard output is libtest's.
pub(crate) const MARK: &str = "@@";

/// A bus of its own in a directory of its own; nothing of it survives the test.
pub(crate) struct Scene {
    directory: tempfile::TempDir,
    pub(crate) name: String,
}

impl Scene {
    pub(crate) fn new(name: &str) -> Scene {
        static SCENES: AtomicU32 = AtomicU32::new(0);
        let name = format!("{name}-{}-{}", std::process::id(), SCENES.fetch_add(1, Ordering::Relaxed));
        Scene { directory: tempfile::Builder::new().prefix("shmbus-test-").tempdir().unwrap(), name }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A connection, as another program would have one.
    pub(crate) fn open(&self) -> Bus {
        self.options().open().unwrap()
    }

    /// How to open this bus.
    pub(crate) fn options(&self) -> BusOptions {
        Bus::options().name(&self.name).directory(self.directory().to_owned())
    }

    /// Starts this test binary again as another process, which runs the test `role` and nothing else.
    pub(crate) fn start(&self, role: &str, arguments: &str) -> Process {
        Process::new(self.command(role, arguments))
    }

    /// What [`Self::start`] runs.
    pub(crate) fn command(&self, role: &str, arguments: &str) -> Command {
        self.command_inside(&[], role, arguments)
    }

    /// [`Self::start`] through another program that starts what its last arguments name.
    pub(crate) fn start_inside(&self, starter: &[&str], role: &str, arguments: &str) -> Process {
        Process::new(self.command_inside(starter, role, arguments))
    }

    /// [`Self::start`] from a copy in `directory`, where it finds no `shmbus` program and has to host a bus itself.
    pub(crate) fn start_alone(&self, directory: &Path, role: &str, arguments: &str) -> Process {
        let copy = directory.join("alone");
        if !copy.exists() {
            // By another program: what we have open for writing while some thread forks cannot be executed.
            assert!(Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&copy).status().unwrap().success());
        }
        let mut command = self.command_of(&[copy.as_os_str()], role, arguments);
        command.env("PATH", "");
        Process::new(command)
    }

    /// [`Self::start`] of this copy of the test binary.
    pub(crate) fn start_program(&self, program: &Path, role: &str, arguments: &str) -> Process {
        Process::new(self.command_of(&[program.as_os_str()], role, arguments))
    }

    fn command_inside(&self, starter: &[&str], role: &str, arguments: &str) -> Command {
        let this = std::env::current_exe().unwrap();
        let line: Vec<&OsStr> = starter.iter().map(OsStr::new).chain([this.as_os_str()]).collect();
        self.command_of(&line, role, arguments)
    }

    fn command_of(&self, line: &[&OsStr], role: &str, arguments: &str) -> Command {
        let mut command = Command::new(line[0]);
        command.args(&line[1..]).args(["--exact", "role", "--nocapture", "--test-threads=1"]);
        command.env(ROLE, role).env(ARGUMENTS, arguments);
        command.env("SHMBUS_DIR", self.directory()).env("SHMBUS_BUS", &self.name);
        command
    }

    /// Hides the bus's socket: whoever loses its connection from now on cannot come back.
    pub(crate) fn hide(&self) {
        let socket = self.directory().join(format!("{}.sock", self.name));
        fs::rename(&socket, socket.with_extension("hidden")).unwrap();
    }

    /// The socket is there again after [`Self::hide`].
    pub(crate) fn show(&self) {
        let socket = self.directory().join(format!("{}.sock", self.name));
        fs::rename(socket.with_extension("hidden"), socket).unwrap();
    }

    /// The command line, on this bus.
    pub(crate) fn shmbus(&self, args: &[&str]) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap().with_file_name("../shmbus"));
        command.args(args).env("SHMBUS_DIR", self.directory()).env("SHMBUS_BUS", &self.name);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The living processes that serve this bus in a role (`None`: all of them).
    pub(crate) fn servers(&self, role: Option<&str>) -> Vec<Pid> {
        let numbers =
            fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
        numbers.filter(|pid| self.serves(*pid, role)).map(Pid::from_raw).collect()
    }

    fn serves(&self, pid: i32, role: Option<&str>) -> bool {
        // A zombie has no command line, so it is rightly counted as dead.
        let Ok(line) = fs::read_to_string(format!("/proc/{pid}/cmdline")) else { return false };
        let args: Vec<&str> = line.split('\0').collect();
        let ours = args.contains(&"serve") && args.contains(&self.name.as_str());
        let played = args.windows(2).find(|pair| pair[0] == "--role").map_or("keeper", |pair| pair[1]);
        ours && role.is_none_or(|role| role == played)
    }

    /// The one living process that serves this bus in that role.
    pub(crate) fn server(&self, role: &str) -> Pid {
        let mut only = None;
        await_that(role, || {
            if let [pid] = self.servers(Some(role))[..] {
                only = Some(pid);
            }
            only.is_some()
        });
        only.expect("it was awaited")
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // Keeper and coordinator restart each other, so both must go before either comes back.
        let deadline = Instant::now() + LIMIT;
        while Instant::now() < deadline {
            let servers = self.servers(None);
            if servers.is_empty() {
                return;
            }
            for pid in servers {
                let _ = kill(pid, Signal::SIGKILL);
            }
        }
    }
}

/// Another process under test; killed when its test is over.
pub(crate) struct Process {
    child: Child,
    lines: Receiver<String>,
    stdin: Option<ChildStdin>,
}

impl Process {
    fn new(mut command: Command) -> Process {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some((_, said)) = line.split_once(MARK) {
                    let _ = sender.send(said.to_owned());
                }
            }
        });
        Process { child, lines, stdin }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// The next thing it says.
    pub(crate) fn line(&mut self) -> String {
        self.line_within(LIMIT)
    }

    /// The next thing it says, where that takes long.
    pub(crate) fn line_within(&mut self, limit: Duration) -> String {
        match self.lines.recv_timeout(limit) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("process {} says nothing", self.pid()),
            Err(RecvTimeoutError::Disconnected) => panic!("process {} ended: {:?}", self.pid(), self.child.wait()),
        }
    }

    pub(crate) fn expect(&mut self, line: &str) {
        assert_eq!(self.line(), line);
    }

    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Kills it and waits until it is dead.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The role to play and its arguments, if this process was started by [`Scene::start`].
pub(crate) fn role() -> Option<(String, String)> {
    let role = std::env::var(ROLE).ok()?;
    Some((role, std::env::var(ARGUMENTS).unwrap()))
}

/// Tells the test something.
pub(crate) fn say(line: &str) {
    println!("{MARK}{line}");
}

/// What the test says next. When the test is gone, so are we.
pub(crate) fn hear() -> String {
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line).unwrap_or(0) == 0 {
        std::process::exit(0);
    }
    line.trim_end().to_owned()
}

/// Makes this process end when its test does; for roles that never listen.
pub(crate) fn end_with_the_test() {
    thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
}

/// Waits for a condition.
pub(crate) fn await_that(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Opens a publisher as soon as its predecessor's death has been noticed.
pub(crate) fn publisher_after<T: Payload + ?Sized>(bus: &Bus, topic: &Topic<T>) -> Publisher<T> {
    once_free("the publisher's place", || bus.publisher(topic.clone()))
}

/// Opens what may still be another's.
pub(crate) fn once_free<H>(what: &str, mut open: impl FnMut() -> Result<H, OpenError>) -> H {
    let mut opened = None;
    await_that(what, || match open() {
        Ok(handle) => {
            opened = Some(handle);
            true
        }
        Err(OpenError::Refused(Refusal::Taken { .. })) => false,
        Err(error) => panic!("{error}"),
    });
    opened.unwrap()
}

/// Sets a flag when it goes, so that other threads end also when their test fails.
pub(crate) struct SetAtEnd<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        // Release: who looks with Acquire sees all that was done before.
        self.0.store(true, Ordering::Release);
    }
}

/// Receives or fails the test.
pub(crate) fn receive(subscriber: &mut Subscriber<[u8]>) -> (u64, Vec<u8>) {
    let message = subscriber.recv_timeout(LIMIT).unwrap();
    (message.sequence().get(), message.to_vec())
}

pub(crate) const MODES: [Mode; 3] = [Mode::Exclusive, Mode::Many, Mode::Channel];

/// All but channels: what has groups, named publishers, envelopes.
pub(crate) const LOGS: [Mode; 2] = [Mode::Exclusive, Mode::Many];

/// The mode that a role was given as an argument.
pub(crate) fn mode_of(argument: &str) -> Mode {
    MODES.into_iter().find(|mode| mode.to_string() == argument).unwrap()
}

/// The same topic in a mode.
pub(crate) fn of_mode<T: ?Sized>(mode: Mode, topic: Topic<T>) -> Topic<T> {
    match mode {
        Mode::Many => topic,
        Mode::Exclusive => topic.exclusive(),
        Mode::Channel => topic.channel(),
    }
}

/// A raw topic of a mode.
pub(crate) fn raw(mode: Mode, name: &str) -> Topic<[u8]> {
    of_mode(mode, Topic::named(format!("{name}.{mode}")))
}

/// A small topic, which is quick to make and to fill.
pub(crate) fn small(name: &str) -> Topic<[u8]> {
    Topic::named(name).messages(16).bytes(4096)
}

/// The number that is a payload.
pub(crate) fn number(payload: &[u8]) -> u64 {
    u64::from_le_bytes(payload.try_into().unwrap())
}

/// What this process has used of a processor.
pub(crate) fn used() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let time = [usage.user_time(), usage.system_time()];
    time.iter().map(|t| Duration::new(t.tv_sec() as u64, t.tv_usec() as u32 * 1000)).sum()
}

/// A seed from `SHMBUS_TEST_SEED` or the clock; printed, so that a failure can be repeated.
pub(crate) fn seed() -> u64 {
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let given = std::env::var("SHMBUS_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(clock);
    println!("SHMBUS_TEST_SEED={seed}");
    seed
}

/// Marsaglia's xorshift64*: enough to choose lengths and moments.
#[derive(Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]));
    }
}

/// FNV-1a over words, so that large payloads are quick to check in a debug build, too.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    let start = 0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64;
    bytes.chunks(8).fold(start, |sum, chunk| (sum ^ word(chunk)).wrapping_mul(0x0100_0000_01b3).rotate_left(23))
}
