//! Finding the coordinator of a bus, or starting one.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use super::{Control, IntroduceError};
use crate::coordinator::directory::Place;
use crate::coordinator::random_u64;
use crate::coordinator::roles;
use crate::coordinator::server::Server;
use crate::error::ConnectError;
use crate::os::socket;

/// Environment variable that names the `shmbus` program.
const BINARY_VARIABLE: &str = "SHMBUS_BIN";

/// How long a coordinator may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Between two looks at a socket that is not there yet.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// A start that shows no effect for so long has met a bus that was just leaving; it is repeated.
const START_AGAIN: Duration = Duration::from_millis(250);

/// How long the program that has started a bus may take to exit once somebody serves.
const EXIT_PATIENCE: Duration = Duration::from_millis(250);

/// Connects to the bus; with `spawn`, starts a coordinator where there is none.
pub(crate) fn connect(place: &Place, spawn: bool) -> Result<Control, ConnectError> {
    let deadline = Instant::now() + PATIENCE;
    // In another user's directory only he can.
    let may_not_spawn = spawn && !place.may_serve();
    let spawn = spawn && !may_not_spawn;
    let mut starter = Starter::new(place.clone());
    let later = || spawn.then(|| Starter::new(place.clone()));
    // A coordinator may let us in and die before it says so: its successor knows us by this.
    let token = random_u64();
    loop {
        match socket::connect(place.socket()) {
            Ok(socket) => match Control::introduce(place.clone(), token, socket, later(), deadline) {
                Ok(control) => return Ok(control),
                Err(IntroduceError::Leaving) => {}
                Err(IntroduceError::Failed(error)) => return Err(error),
            },
            Err(error) if socket::is_absent(&error) && spawn => starter.start()?,
            Err(error) if socket::is_absent(&error) && may_not_spawn => return Err(place.nobody_serves()),
            Err(error) if socket::is_absent(&error) => {
                return Err(ConnectError::NotRunning { bus: place.bus.clone(), path: place.socket().to_owned() });
            }
            // Everybody connects at once; our turn comes.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(source) => {
                return Err(ConnectError::io(format!("cannot connect to {}", place.socket().display()), source));
            }
        }
        if Instant::now() >= deadline {
            return Err(ConnectError::Timeout { bus: place.bus.clone(), waited_ms: PATIENCE.as_millis() as u64 });
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// Starts coordinators, one at a time.
pub(crate) struct Starter {
    place: Place,
    child: Option<(PathBuf, Child)>,
    start_at: Instant,
}

impl Starter {
    fn new(place: Place) -> Starter {
        Starter { place, child: None, start_at: Instant::now() }
    }

    /// Starts a coordinator unless one is starting. Several programs may do so at once: the lock lets one of them win.
    pub(crate) fn start(&mut self) -> Result<(), ConnectError> {
        if let Some((program, mut child)) = self.child.take() {
            match child.try_wait() {
                Ok(None) if Instant::now() < self.start_at + PATIENCE => self.child = Some((program, child)),
                // Stopped, perhaps.
                Ok(None) => end(&mut child),
                Ok(Some(status)) if !status.success() => {
                    return Err(failed(&program, io::Error::other(status.to_string())));
                }
                Ok(Some(_)) => {}
                // Where SIGCHLD is ignored the kernel reaps children, and nobody learns how they ended.
                Err(error) if error.raw_os_error() == Some(Errno::ECHILD as i32) => {}
                Err(error) => return Err(failed(&program, error)),
            }
        }
        if self.child.is_some() || Instant::now() < self.start_at {
            return Ok(());
        }
        self.start_at = Instant::now() + START_AGAIN;
        match find_binary()? {
            Some(program) => {
                let child = roles::start_launcher(&program, &self.place).map_err(|source| failed(&program, source))?;
                self.child = Some((program, child));
                Ok(())
            }
            None => self.host(),
        }
    }

    /// Serves the bus on a thread of this process, for want of a binary. It ends with the process.
    fn host(&self) -> Result<(), ConnectError> {
        let Some(lock) = self.place.lock()? else { return Ok(()) };
        let listener = self.place.listen()?;
        let place = self.place.clone();
        let serve = move || {
            // All of it here: it may have to hear from this process before it serves.
            if let Err(error) = Server::host(place, lock, listener).and_then(Server::run) {
                eprintln!("shmbus coordinator: {error}");
            }
        };
        let thread = thread::Builder::new().name("shmbus".to_owned()).spawn(serve);
        thread.map(drop).map_err(|source| ConnectError::io("cannot start a coordinator thread", source))
    }

    /// There is a coordinator: waits for the program that has started it. It exits once the bus is on its way; left alone it
    /// would stay a zombie. One that is stopped, or never exits, is ended: nobody needs it any more, and our caller goes on.
    pub(crate) fn finish(&mut self) {
        let Some((_, mut child)) = self.child.take() else { return };
        let deadline = Instant::now() + EXIT_PATIENCE;
        // An error: it has been reaped, or is our parent's, whose copy we are.
        while let Ok(None) = child.try_wait() {
            if Instant::now() >= deadline {
                return end(&mut child);
            }
            thread::sleep(LOOK_AGAIN);
        }
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        self.finish();
    }
}

/// Kills a child that has not been reaped.
fn end(child: &mut Child) {
    // Both fail where it has gone meanwhile.
    let _ = child.kill();
    let _ = child.wait();
}

/// `$SHMBUS_BIN`, beside this program (or one directory up, where cargo puts tests and examples below the binary), or
/// on the path.
fn find_binary() -> Result<Option<PathBuf>, ConnectError> {
    if let Some(given) = env::var_os(BINARY_VARIABLE).filter(|given| !given.is_empty()) {
        let given = PathBuf::from(given);
        if is_program(&given) {
            return Ok(Some(given));
        }
        let mend = "correct SHMBUS_BIN, or unset it to search beside the program and on PATH";
        let problem = "SHMBUS_BIN names no program".to_owned();
        return Err(ConnectError::Refused { path: given, problem, mend });
    }
    let own = env::current_exe().ok();
    let beside = own.iter().flat_map(|own| own.ancestors().skip(1).take(2)).map(Path::to_owned);
    let on_path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    Ok(beside.chain(on_path).map(|directory| directory.join("shmbus")).find(|program| is_program(program)))
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}

fn failed(program: &Path, source: io::Error) -> ConnectError {
    ConnectError::io(format!("cannot start a coordinator with {} serve", program.display()), source)
}
