//! The control connection of one process: requests, descriptors of new arenas, and coming back after the coordinator
//! has died.
//!
//! Handles work without it; it is needed to open and close them, and it is where descriptors of new arenas arrive. A
//! connection that breaks gives nothing back: who drops its bus and its last handle says good-bye.

mod come_back;
mod given_up;
mod holdings;
pub(super) mod launch;
mod leave;
mod pushed;
mod receive;
mod requests;
pub(super) mod watch;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use come_back::check_peer;
use holdings::Holdings;
use launch::Starter;
use nix::poll::PollFlags;
use pushed::Pushed;

use crate::coordinator::directory::Place;
use crate::coordinator::protocol::{Answer, HandleRef, MAX_PACKET_BYTES, PROTOCOL_VERSION};
use crate::error::{ConnectError, Refusal};
use crate::os::home::Home;
use crate::os::socket;

/// Longest single wait: another thread may have received the answer that this one waits for.
const SLICE: Duration = Duration::from_millis(5);

/// An answer with its descriptors.
pub(crate) type Granted = (Answer, Vec<OwnedFd>);

/// Why a new connection did not become one.
#[derive(Debug)]
pub(crate) enum IntroduceError {
    /// The coordinator is going away: look for the next one.
    Leaving,
    Failed(ConnectError),
}

/// The control connection, shared by the bus and all its handles.
pub(crate) struct Control {
    place: Place,
    /// The process it belongs to; a forked child must leave it alone.
    home: Home,
    /// Held for a whole request: one at a time. The number of the last that was to be done once.
    turn: Mutex<u64>,
    line: Arc<Line>,
}

/// What a connection and the thread that watches over it share. The thread has a weak reference and makes it strong for a
/// look, so the good-bye is said where the [`Control`] is dropped; and a child that is forked in the middle of a look
/// finds a reference too many, and leaves alone what may be half changed.
pub(crate) struct Line {
    /// Starts a coordinator where there is none any more; `None` where that is not wanted.
    starter: Option<Mutex<Starter>>,
    /// Held for moments only, never while waiting; but for the good-bye.
    inner: Mutex<Inner>,
    /// Handles to be closed by whoever has `inner`, or has it next.
    given_up: Mutex<Vec<HandleRef>>,
}

/// What is known of the connection; a file each says what is done with it.
struct Inner {
    place: Place,
    /// What we call ourselves.
    token: u64,
    /// `None` while the connection is broken.
    socket: Option<Arc<OwnedFd>>,
    /// How many connections there have been.
    generation: u64,
    /// Whether the present connection has been answered its Hello.
    welcomed: bool,
    /// Whether nobody listened when we tried to connect, though the bus has not ended.
    absent: bool,
    /// When to knock again at a coordinator that could not have us back just now.
    again_at: Option<Instant>,
    /// Who we are, once we have been told.
    identity: Option<Identity>,
    /// Why nothing can be asked any more.
    end: Option<End>,
    /// Whether the last handle has gone.
    is_leaving: bool,
    /// The connection on which good-bye was said.
    goodbye_on: Option<u64>,
    /// The line itself, from where nobody else holds it until the good-bye is heard.
    lingering: Option<Arc<Line>>,
    holds: HashSet<HandleRef>,
    /// What of it a new coordinator would ask for.
    holdings: Holdings,
    /// Arenas announced for the topics we read. They stay here, several subscribers may ask for one.
    arenas: BTreeMap<(u64, u32), OwnedFd>,
    /// Arenas whose descriptor did not get through, because this process had as many as it may have. A new connection brings all
    /// of them again.
    missed_arenas: HashSet<(u64, u32)>,
    /// Topics of wildcard subscriptions that nobody has taken yet.
    pushed: Pushed,
    /// Answers to come, in order, and whether anybody waits for them.
    expected: VecDeque<bool>,
    /// Answers received for whoever has the turn.
    answers: VecDeque<Granted>,
    /// Closed handles for which there was no room while something is presented.
    unsent: Vec<HandleRef>,
    buffer: Box<[u8]>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Identity {
    incarnation: u64,
    bus: u64,
}

/// The last word of the connection.
#[derive(Clone)]
enum End {
    Ended,
    Leaving,
    Refused(Refusal),
    Version(u32),
    Garbled(String),
}

impl Control {
    /// Says Hello over a new connection and waits to be welcomed, by the same `token` until it is. `starter`: what starts a coordinator later on, when there is
    /// none any more.
    pub(crate) fn introduce(
        place: Place,
        token: u64,
        socket: OwnedFd,
        starter: Option<Starter>,
        deadline: Instant,
    ) -> Result<Control, IntroduceError> {
        check_peer(&place, &socket).map_err(IntroduceError::Failed)?;
        let home = Home::here()
            .map_err(|source| IntroduceError::Failed(ConnectError::io("cannot mark this process", source)))?;
        let mut inner = Inner::new(place.clone(), token);
        // A coordinator that hangs up before it has welcomed us is leaving.
        inner.say_hello(socket).map_err(|_| IntroduceError::Leaving)?;
        while !inner.welcomed {
            inner.receive_all();
            match (&inner.end, &inner.socket) {
                (Some(End::Leaving), _) => return Err(IntroduceError::Leaving),
                (Some(end), _) => return Err(IntroduceError::Failed(end.error(&place))),
                (None, None) => return Err(IntroduceError::Leaving),
                (None, Some(_)) if inner.welcomed => break,
                (None, Some(socket)) => wait(socket, deadline).map_err(IntroduceError::Failed)?,
            }
            if Instant::now() >= deadline {
                // We may have been let in at this very moment.
                inner.leave_at_once();
                return Err(IntroduceError::Failed(ConnectError::Timeout { bus: place.bus, waited_ms: 5_000 }));
            }
        }
        let (starter, inner) = (starter.map(Mutex::new), Mutex::new(inner));
        let line = Arc::new(Line { starter, inner, given_up: Mutex::default() });
        Ok(Control { place, home, turn: Mutex::new(0), line })
    }

    /// The process that opened the bus, and so whatever is opened on it.
    pub(crate) fn home(&self) -> Home {
        self.home
    }

    /// What the thread that watches over the connection needs of it.
    pub(crate) fn line(&self) -> &Arc<Line> {
        &self.line
    }

    pub(crate) fn bus_name(&self) -> &str {
        &self.place.bus
    }

    /// The bus's number, which every segment of it carries.
    pub(crate) fn bus_number(&self) -> u64 {
        self.line.hold().identity.map_or(0, |identity| identity.bus)
    }

    /// Refuses forked children.
    #[inline]
    pub(crate) fn check_process(&self) -> Result<(), ConnectError> {
        if self.home.is_here() {
            return Ok(());
        }
        Err(ConnectError::Forked { opened_by: self.home.pid(), pid: std::process::id() })
    }
}

impl Inner {
    fn new(place: Place, token: u64) -> Inner {
        Inner {
            place,
            token,
            socket: None,
            generation: 0,
            welcomed: false,
            absent: false,
            again_at: None,
            identity: None,
            end: None,
            is_leaving: false,
            goodbye_on: None,
            lingering: None,
            holds: HashSet::new(),
            holdings: Holdings::new(),
            arenas: BTreeMap::new(),
            missed_arenas: HashSet::new(),
            pushed: Pushed::default(),
            expected: VecDeque::new(),
            answers: VecDeque::new(),
            unsent: Vec::new(),
            buffer: vec![0; MAX_PACKET_BYTES].into_boxed_slice(),
        }
    }
}

impl End {
    fn error(&self, place: &Place) -> ConnectError {
        match self {
            End::Ended | End::Leaving => ConnectError::Ended { bus: place.bus.clone() },
            End::Refused(refusal) => ConnectError::Declined(refusal.clone()),
            End::Version(found) => ConnectError::Version { expected: PROTOCOL_VERSION, found: *found },
            End::Garbled(problem) => ConnectError::Garbled(problem.clone()),
        }
    }
}

fn wait(socket: &OwnedFd, deadline: Instant) -> Result<(), ConnectError> {
    let waited = socket::wait(socket.as_fd(), PollFlags::POLLIN, Some(deadline));
    waited.map(drop).map_err(|source| ConnectError::io("waiting for the coordinator", source))
}

/// Waits a slice for something to read, or for the coordinator to come back.
fn pause(socket: Option<&OwnedFd>, deadline: Instant) {
    let until = deadline.min(Instant::now() + SLICE);
    let waited = socket.map(|socket| socket::wait(socket.as_fd(), PollFlags::POLLIN, Some(until)));
    if !matches!(waited, Some(Ok(_))) {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Locks; a thread that panicked here left nothing half done that matters.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
