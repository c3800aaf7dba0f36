//! A private bus in a directory of its own, for `demo` and `bench`: whatever happens, nothing of it is left.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shmbus::Bus;

/// The sandbox of this process, for [`Sandbox::abandon`].
static CURRENT: Mutex<Option<PathBuf>> = Mutex::new(None);

/// How long the coordinator and keeper of a stopped bus may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// How long a child may take to end when asked to.
const END_LIMIT: Duration = Duration::from_secs(5);

pub(crate) struct Sandbox {
    /// Ours alone: the bus's own directory lies in it, and whatever files its user makes.
    directory: PathBuf,
    stopped: bool,
}

impl Sandbox {
    /// A fresh directory, mode 0700. Nothing runs yet.
    pub(crate) fn new() -> anyhow::Result<Sandbox> {
        // A socket's path has at most 107 bytes, and some temporary directories are deep.
        let base = Some(std::env::temp_dir()).filter(|d| d.as_os_str().len() <= 60).unwrap_or_else(|| "/tmp".into());
        let template = base.join("shmbus-private-XXXXXX");
        let directory = nix::unistd::mkdtemp(&template)
            .map_err(|e| anyhow::anyhow!("cannot make a directory {}: {e}", template.display()))?;
        *CURRENT.lock().unwrap_or_else(PoisonError::into_inner) = Some(directory.clone());
        let sandbox = Sandbox { directory, stopped: false };
        fs::DirBuilder::new().mode(0o700).create(sandbox.bus_directory())?;
        Ok(sandbox)
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    fn bus_directory(&self) -> PathBuf {
        self.directory.join("bus")
    }

    /// The private bus, its coordinator started where none runs.
    pub(crate) fn open(&self) -> anyhow::Result<Bus> {
        Ok(Bus::options().name("private").directory(self.bus_directory()).open()?)
    }

    /// This program with other arguments, on the private bus. It dies with this process.
    pub(crate) fn command(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program's own file")?);
        command.args(args).env("SHMBUS_DIR", self.bus_directory()).env("SHMBUS_BUS", "private");
        command.env("TMPDIR", &self.directory); // a child's sandbox goes away with ours, however the child ends
        let parent = nix::unistd::getpid();
        // SAFETY: between fork and exec only async-signal-safe calls are made (prctl and getppid); nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before the call above.
                if nix::unistd::getppid() == parent { Ok(()) } else { Err(nix::errno::Errno::ESRCH.into()) }
            });
        }
        Ok(command)
    }

    /// Ends the bus and removes the directory; fails if a process or file of it stays behind.
    pub(crate) fn close(mut self) -> anyhow::Result<()> {
        self.stopped = true;
        let ended = self.stop_bus();
        let killed = kill_all(&serving(&self.directory));
        fs::remove_dir_all(&self.directory).with_context(|| format!("cannot remove {}", self.directory.display()))?;
        ended?;
        ensure!(killed == 0, "{killed} processes of the stopped bus had to be killed");
        Ok(())
    }

    /// The last resort of a process that is about to exit: no farewells, but nothing stays behind.
    pub(crate) fn abandon() -> String {
        if let Some(directory) = CURRENT.lock().unwrap_or_else(PoisonError::into_inner).take() {
            kill_all(&serving(&directory));
            let _ = fs::remove_dir_all(&directory);
        }
        String::new()
    }

    fn stop_bus(&self) -> anyhow::Result<()> {
        match Bus::options().name("private").directory(self.bus_directory()).spawn(false).open() {
            Ok(bus) => bus.stop()?,
            Err(shmbus::ConnectError::NotRunning { .. }) => {}
            Err(e) => return Err(e.into()),
        }
        let deadline = Instant::now() + STOP_LIMIT;
        while !serving(&self.directory).is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Sandbox {
    /// The way out after a failure: the same, without a word.
    fn drop(&mut self) {
        if !self.stopped {
            let _ = self.stop_bus();
            kill_all(&serving(&self.directory));
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

/// A process that serves the private bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) pid: Pid,
    /// Its arguments, separated by spaces.
    pub(crate) command_line: String,
}

/// The coordinator and keeper of the bus in this directory: they are not our children, but nothing else has the
/// directory's unrepeatable name in its arguments or environment and `serve` for a command.
pub(crate) fn serving(directory: &Path) -> Vec<Server> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let name = directory.as_os_str().as_encoded_bytes();
    let contains = |bytes: &[u8]| bytes.windows(name.len()).any(|window| window == name);
    let server = |entry: fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        let serves = arguments.split(|b| *b == 0).any(|argument| argument == b"serve");
        let ours = || contains(&arguments) || fs::read(entry.path().join("environ")).is_ok_and(|e| contains(&e));
        let command_line = String::from_utf8_lossy(&arguments).replace('\0', " ");
        (serves && ours()).then_some(Server { pid: Pid::from_raw(pid), command_line })
    };
    processes.flatten().filter_map(server).collect()
}

fn kill_all(servers: &[Server]) -> usize {
    servers.iter().filter(|server| kill(server.pid, Signal::SIGKILL).is_ok()).count()
}

/// A child process that is ended and reaped when its owner gives up on it.
pub(crate) struct Minder(pub(crate) Child);

impl Minder {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }
}

impl Drop for Minder {
    /// Asks first: a child that has a sandbox of its own must tidy up.
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = kill(self.pid(), Signal::SIGTERM);
        }
        let deadline = Instant::now() + END_LIMIT;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
