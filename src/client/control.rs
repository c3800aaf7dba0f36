//! The control connection of one process: requests, descriptors of new arenas, and coming back after the coordinator
//! has died.
//!
//! Handles work without it; it is needed to open and close them, and it is where descriptors of new arenas arrive. A
//! connection that breaks gives nothing back: who drops its bus and its last handle says good-bye.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::unistd::Uid;

use crate::client::holdings::{Holdings, arena_name};
use crate::client::launch::Starter;
use crate::client::pushed::Pushed;
use crate::client::watch::Look;
use crate::coordinator::directory::Place;
use crate::coordinator::protocol::{Answer, HandleRef, MAX_PACKET_BYTES, MAX_PACKET_FDS, PROTOCOL_VERSION, Request};
use crate::coordinator::registry;
use crate::error::{ConnectError, OpenError, Refusal};
use crate::os::home::Home;
use crate::os::socket;

/// How long a request waits for its answer, a restart of the coordinator included.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a reader waits for an arena's descriptor that is not in its socket: the coordinator has it in its queue, or
/// is being restarted.
const ARENA_PATIENCE: Duration = Duration::from_secs(2);

/// How long the last handle's end waits for the coordinator's farewell.
const LEAVE_PATIENCE: Duration = Duration::from_millis(100);

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

/// A hold on `inner`. What was given up before is closed before anything else is said, what is given up meanwhile when it is let
/// go: nobody else would do it.
struct Hold<'a> {
    line: &'a Line,
    /// `None` while it is let go.
    inner: Option<MutexGuard<'a, Inner>>,
}

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
    /// Who we are, once we have been told.
    identity: Option<Identity>,
    /// Why nothing can be asked any more.
    end: Option<End>,
    holds: HashSet<HandleRef>,
    /// What of it a new coordinator would ask for.
    holdings: Holdings,
    /// Arenas announced for the topics we read. They stay here, several subscribers may ask for one.
    arenas: HashMap<(u64, u32), OwnedFd>,
    /// Topics of wildcard subscriptions that nobody has taken yet.
    pushed: Pushed,
    /// Answers to come, in order, and whether anybody waits for them.
    expected: VecDeque<bool>,
    /// Answers received for whoever has the turn.
    answers: VecDeque<Granted>,
    /// Closed handles that did not fit in the socket.
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

    /// Asks the coordinator and waits for the answer; a refusal is an error. If the coordinator dies meanwhile, its
    /// successor is asked.
    pub(crate) fn request(&self, request: &Request) -> Result<Granted, OpenError> {
        self.check_process()?;
        self.ask(lock(&self.turn), request, 0)
    }

    /// The same for what is to be done once: a successor of the coordinator that had done it says so, and does not find that it has
    /// been done already.
    pub(crate) fn request_once(&self, request: &Request) -> Result<Granted, OpenError> {
        self.check_process()?;
        let mut turn = lock(&self.turn);
        *turn += 1;
        let once = *turn;
        self.ask(turn, request, once)
    }

    fn ask(&self, turn: MutexGuard<'_, u64>, request: &Request, once: u64) -> Result<Granted, OpenError> {
        let answer = self.exchange(request, once, Instant::now() + PATIENCE);
        drop(turn);
        match answer? {
            (Answer::Refused(refusal), _) => Err(refusal.into()),
            granted => Ok(granted),
        }
    }

    /// Tells the coordinator something, and does not wait for the answer. `false`: it could not be told now.
    pub(crate) fn tell(&self, request: &Request) -> bool {
        if self.check_process().is_err() {
            return false;
        }
        self.line.try_hold().is_some_and(|mut inner| {
            inner.receive_all();
            inner.connect().is_ok() && inner.welcomed && matches!(inner.send(request, 0, false), Ok(true))
        })
    }

    /// The descriptor of an arena that came into being after the subscriber was opened. It was sent before anything
    /// was written there, so it waits in our socket, also when the coordinator has died since. If our socket was full it
    /// waits with the coordinator, which goes on as we read; if the connection broke before that, the coordinator is
    /// asked for it by coming back. `None`: not there, and it does not come.
    pub(crate) fn arena(&self, topic: u64, slot: u32) -> Option<OwnedFd> {
        self.check_process().ok()?;
        let deadline = Instant::now() + ARENA_PATIENCE;
        if let Some(fd) = self.announced_arena(topic, slot) {
            return Some(fd);
        }
        // Packets come in order: what was sent to us before an answer is here with it. So a garbled entry, for whose arena one
        // would wait in vain, costs no more than a question.
        if let Ok(turn) = self.turn.try_lock() {
            let asked = self.exchange(&Request::Status { topic: Some(String::new()), after: None }, 0, deadline);
            drop(turn);
            if asked.is_ok() {
                return self.announced_arena(topic, slot);
            }
        }
        let mut inner = self.line.hold();
        loop {
            inner.receive_all();
            if let Some(fd) = inner.arenas.get(&(topic, slot)) {
                return fd.try_clone().ok();
            }
            // Where connecting fails for another reason than the end of the bus, it may succeed in a moment.
            let _ = inner.connect();
            if inner.end.is_some() || Instant::now() >= deadline {
                return None;
            }
            let socket = inner.socket.clone();
            drop(inner);
            pause(socket.as_deref(), deadline);
            inner = self.line.hold();
        }
    }

    /// The descriptor of an arena, if it has come.
    fn announced_arena(&self, topic: u64, slot: u32) -> Option<OwnedFd> {
        let mut inner = self.line.hold();
        inner.receive_all();
        inner.arenas.get(&(topic, slot))?.try_clone().ok()
    }

    /// The bus's number, which every segment of it carries.
    pub(crate) fn bus_number(&self) -> u64 {
        self.line.hold().identity.map_or(0, |identity| identity.bus)
    }

    /// Takes the topics that have come for a wildcard subscription, and how many have come in all. Never waits: where
    /// fewer have come than were `announced`, the rest is with the coordinator, to which a broken connection is renewed.
    pub(crate) fn wildcard_topics(&self, wildcard: u64, announced: u64) -> Result<(Vec<Granted>, u64), ConnectError> {
        self.check_process()?;
        let mut inner = self.line.hold();
        inner.receive_all();
        let (granted, told) = inner.pushed.take(wildcard);
        let connected = if told < announced { inner.connect() } else { Ok(()) };
        drop(inner);
        match connected {
            // What has come counts, whatever became of the coordinator.
            Err(error) if granted.is_empty() => Err(error),
            _ => Ok((granted, told)),
        }
    }

    /// Gives a handle back. Never waits: if the coordinator is away or busy with us, it learns of it later.
    pub(crate) fn release(&self, handle: HandleRef) {
        if self.check_process().is_ok() {
            lock(&self.line.given_up).push(handle);
            self.line.close_given_up();
        }
    }

    /// Asks and waits for the answer until `deadline`. The caller has the turn.
    fn exchange(&self, request: &Request, once: u64, deadline: Instant) -> Result<Granted, ConnectError> {
        let mut sent_on = None;
        loop {
            let mut inner = self.line.hold();
            inner.receive_all();
            if sent_on == Some(inner.generation)
                && let Some(answer) = inner.answers.pop_front()
            {
                return Ok(answer);
            }
            inner.connect()?;
            let absent = inner.absent;
            if sent_on != Some(inner.generation) && inner.welcomed && inner.send(request, once, true)? {
                sent_on = Some(inner.generation);
            }
            if Instant::now() >= deadline {
                // The answer may come yet; what it opens is given back then.
                inner.expected.iter_mut().for_each(|waited_for| *waited_for = false);
                return Err(ConnectError::Timeout {
                    bus: self.place.bus.clone(),
                    waited_ms: PATIENCE.as_millis() as u64,
                });
            }
            let socket = inner.socket.clone();
            drop(inner);
            if absent {
                self.line.revive()?;
            }
            pause(socket.as_deref(), deadline);
        }
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

impl Line {
    /// Waits for whoever has `inner`, for a moment.
    fn hold(&self) -> Hold<'_> {
        self.held(lock(&self.inner))
    }

    /// `None`: somebody else has it.
    fn try_hold(&self) -> Option<Hold<'_>> {
        self.inner.try_lock().ok().map(|inner| self.held(inner))
    }

    fn held<'a>(&'a self, mut inner: MutexGuard<'a, Inner>) -> Hold<'a> {
        self.close_into(&mut inner);
        Hold { line: self, inner: Some(inner) }
    }

    fn close_into(&self, inner: &mut Inner) {
        let handles = std::mem::take(&mut *lock(&self.given_up));
        if !handles.is_empty() {
            inner.close(&handles);
        }
    }

    /// Closes what was given up, unless another thread has `inner` and does so when it is done.
    fn close_given_up(&self) {
        // Something given up after the look and before the unlock found `inner` taken: so look again.
        while !lock(&self.given_up).is_empty() {
            let Ok(mut inner) = self.inner.try_lock() else { return };
            self.close_into(&mut inner);
        }
    }

    /// Comes back where the connection is broken; what there is to wait for then.
    pub(crate) fn look(&self) -> Look {
        let mut inner = self.hold();
        inner.receive_all();
        // Where connecting fails for another reason than the end of the bus, it may succeed in a moment.
        let _ = inner.connect();
        inner.present();
        if inner.end.is_some() {
            return Look::Ended;
        }
        match inner.socket.clone() {
            Some(socket) if !inner.welcomed && inner.holdings.next().is_none() => Look::Asking(socket),
            Some(socket) if inner.holdings.next().is_none() => {
                drop(inner);
                if let Some(mut starter) = self.starter.as_ref().and_then(|starter| starter.try_lock().ok()) {
                    starter.finish();
                }
                Look::Connected(socket)
            }
            Some(_) => Look::Sending,
            None if inner.absent => {
                drop(inner);
                // If it cannot be started now, perhaps somebody else does, or the next look.
                let _ = self.revive();
                Look::Away
            }
            None => Look::Away,
        }
    }

    /// Starts a coordinator in the place of the dead one and its keeper, if we may. Never waits.
    fn revive(&self) -> Result<(), ConnectError> {
        // Who has it is at it.
        let starter = self.starter.as_ref().and_then(|starter| starter.try_lock().ok());
        starter.map_or(Ok(()), |mut starter| starter.start())
    }
}

impl Deref for Hold<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        self.inner.as_ref().expect("it is let go by drop alone")
    }
}

impl DerefMut for Hold<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        self.inner.as_mut().expect("it is let go by drop alone")
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        self.inner = None;
        self.line.close_given_up();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if self.check_process().is_err() {
            return;
        }
        let mut inner = lock(&self.line.inner);
        inner.take_leave();
        inner.end = Some(End::Ended);
        if let Some(socket) = &inner.socket {
            socket::shut_down(socket.as_fd());
        }
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
            identity: None,
            end: None,
            holds: HashSet::new(),
            holdings: Holdings::new(),
            arenas: HashMap::new(),
            pushed: Pushed::default(),
            expected: VecDeque::new(),
            answers: VecDeque::new(),
            unsent: Vec::new(),
            buffer: vec![0; MAX_PACKET_BYTES].into_boxed_slice(),
        }
    }

    /// Comes back if the connection is broken; does not wait for the welcome.
    fn connect(&mut self) -> Result<(), ConnectError> {
        if let Some(end) = &self.end {
            return Err(end.error(&self.place));
        }
        if self.socket.is_some() {
            return Ok(());
        }
        // Before we knock: what listens after the end is another bus, or a service manager that would start one.
        if !self.is_left_behind() {
            self.end = Some(End::Ended);
            return Err(End::Ended.error(&self.place));
        }
        let socket = match socket::connect(self.place.socket()) {
            Ok(socket) => socket,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            // Coordinator and keeper are both dead, and nobody has come in their place yet.
            Err(error) if socket::is_absent(&error) => {
                self.absent = true;
                return Ok(());
            }
            Err(source) => return Err(ConnectError::io("cannot connect to the coordinator again", source)),
        };
        self.absent = false;
        check_peer(&self.place, &socket)?;
        // If it hangs up at once, the next attempt finds out.
        let _ = self.say_hello(socket);
        Ok(())
    }

    /// Whether our bus has a registry: one that ends takes it along.
    fn is_left_behind(&self) -> bool {
        match registry::bus_at(self.place.registry()) {
            Ok(left) => left.is_some() && left == self.identity.map(|identity| identity.bus),
            // Of what cannot be looked at, want of a descriptor say, nobody knows that it has ended.
            Err(_) => true,
        }
    }

    /// Sends what the coordinator asked us to present, as far as there is room.
    fn present(&mut self) {
        while let (Some(socket), Some((request, fds))) = (self.socket.clone(), self.holdings.next()) {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            let bytes = postcard::to_stdvec(request).map_err(io::Error::other);
            match bytes.and_then(|bytes| socket::send(socket.as_fd(), &bytes, &fds)) {
                Ok(()) => self.holdings.sent(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // As many descriptors are on their way as a user may have there.
                Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => return,
                // Its hang-up is read next.
                Err(_) => self.holdings.forget_plan(),
            }
        }
    }

    /// A handle is not ours any more.
    fn let_go(&mut self, handle: HandleRef) {
        if self.holds.remove(&handle) {
            self.holdings.closed(handle);
        }
    }

    /// Starts a connection: everything that the former one still owed us is void.
    fn say_hello(&mut self, socket: OwnedFd) -> io::Result<()> {
        for (answer, _) in std::mem::take(&mut self.answers) {
            // It was granted, but nobody has taken it: not naming it gives it back.
            if let Some(handle) = opened_handle(&answer) {
                self.let_go(handle);
            }
        }
        for handle in self.pushed.drop_ungranted(&self.holds) {
            self.let_go(handle);
        }
        self.welcomed = false;
        self.expected.clear();
        self.holdings.forget_plan();
        self.unsent.clear();
        self.generation += 1;
        let hello = Request::Hello {
            protocol: PROTOCOL_VERSION,
            token: self.token,
            incarnation: self.identity.map(|identity| identity.incarnation),
            holds: self.holds.iter().copied().collect(),
        };
        let bytes = postcard::to_stdvec(&hello).map_err(io::Error::other)?;
        socket::send(socket.as_fd(), &bytes, &[])?;
        self.socket = Some(Arc::new(socket));
        Ok(())
    }

    /// Sends a request; false when it does not fit now or the connection broke.
    fn send(&mut self, request: &Request, once: u64, waited_for: bool) -> Result<bool, ConnectError> {
        let Some(socket) = &self.socket else { return Ok(false) };
        let bytes = request.to_packet(once).map_err(|error| ConnectError::Garbled(error.to_string()))?;
        if bytes.len() > MAX_PACKET_BYTES {
            let problem = format!("the request has {} bytes, at most {MAX_PACKET_BYTES} are possible", bytes.len());
            return Err(ConnectError::Garbled(problem));
        }
        match socket::send(socket.as_fd(), &bytes, &[]) {
            Ok(()) => {
                self.expected.push_back(waited_for);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(_) => {
                // What the dead coordinator had sent is still to be read; the hang-up comes behind it.
                self.receive_all();
                self.socket = None;
                Ok(false)
            }
        }
    }

    /// Makes sure that the coordinator, or its successor if it dies just now, learns that nothing is held any more: a
    /// mere hang-up would leave our places to us until this process ends.
    fn take_leave(&mut self) {
        let deadline = Instant::now() + LEAVE_PATIENCE;
        let mut said_on = None;
        self.holds.clear();
        loop {
            self.receive_all();
            // Farewell is an end, too. Where connecting fails otherwise, it may succeed in a moment.
            let _ = self.connect();
            if self.end.is_some() {
                return;
            }
            if said_on != Some(self.generation) && self.say_goodbye() {
                said_on = Some(self.generation);
            }
            if Instant::now() >= deadline {
                break;
            }
            let socket = self.socket.clone();
            pause(socket.as_deref(), deadline);
        }
        if said_on != Some(self.generation) {
            // The socket is full: its coordinator is stopped. A new one waits for it, and comes behind the full one.
            if let Some(full) = self.socket.take() {
                // Whoever watches over it sleeps until it ends.
                socket::shut_down(full.as_fd());
            }
            let _ = self.connect();
            self.say_goodbye();
        }
    }

    fn say_goodbye(&mut self) -> bool {
        self.send(&Request::Goodbye, 0, false).is_ok_and(|sent| sent)
    }

    /// Tells the coordinator, now or with the next Hello, that these handles are gone.
    fn close(&mut self, handles: &[HandleRef]) {
        for handle in handles {
            self.let_go(*handle);
            match *handle {
                HandleRef::Wildcard { wildcard } => self.end_wildcard(wildcard),
                subscriber => self.pushed.forget(subscriber),
            }
        }
        let holds = &self.holds;
        self.arenas.retain(|(topic, _), _| may_read(holds, *topic));
        self.receive_all();
        if self.socket.is_none() {
            // The Hello leaves them out. If that is not possible now, the next one will.
            let _ = self.connect();
            return;
        }
        self.unsent.extend_from_slice(handles);
        self.send_closes();
    }

    /// A wildcard subscription's subscribers go with it, on the coordinator's side too.
    fn end_wildcard(&mut self, wildcard: u64) {
        for handle in self.pushed.end(wildcard) {
            self.let_go(handle);
        }
    }

    fn send_closes(&mut self) {
        if self.unsent.is_empty() {
            return;
        }
        let handles = std::mem::take(&mut self.unsent);
        match self.send(&Request::Close { handles: handles.clone() }, 0, false) {
            Ok(true) => {}
            _ if self.socket.is_some() => self.unsent = handles,
            _ => {}
        }
    }

    /// Takes everything out of the socket that is there.
    fn receive_all(&mut self) {
        while let Some(socket) = self.socket.clone() {
            match socket::recv(socket.as_fd(), &mut self.buffer, MAX_PACKET_FDS) {
                Ok(packet) if packet.len == 0 => self.socket = None,
                Ok(packet) => match postcard::from_bytes(&self.buffer[..packet.len]) {
                    Ok(answer) if !packet.truncated => self.receive(answer, packet.fds),
                    _ => return self.end = Some(End::Garbled("the coordinator sent something unreadable".to_owned())),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    let lost = self.socket.take();
                    // The program has closed it behind our back: the number is free, or names something of its own that
                    // is not ours to close.
                    if matches!(error.raw_os_error(), Some(libc::EBADF | libc::ENOTSOCK)) {
                        std::mem::forget(lost);
                    }
                }
            }
        }
    }

    fn receive(&mut self, answer: Answer, mut fds: Vec<OwnedFd>) {
        match answer {
            Answer::ArenaAdded { topic, slot } => {
                if let Some(fd) = fds.pop().filter(|_| may_read(&self.holds, topic)) {
                    self.holdings.keep(topic, arena_name(slot), &fd);
                    self.arenas.insert((topic, slot), fd);
                }
            }
            Answer::WildcardTopic { wildcard, told, ref info, cursor, .. } => {
                let subscriber = HandleRef::Subscriber { topic: info.id, cursor };
                if self.pushed.is_awaited(&self.holds, wildcard) {
                    if self.holds.insert(subscriber) {
                        self.holdings.opened(&answer, &fds);
                    }
                    self.pushed.add(wildcard, told, subscriber, (answer, fds));
                }
            }
            Answer::WildcardMissed { wildcard, told, .. } => {
                if self.pushed.is_awaited(&self.holds, wildcard) {
                    self.pushed.miss(wildcard, told, answer);
                }
            }
            Answer::WildcardTold { wildcard, told } => self.pushed.set_told(wildcard, told),
            Answer::Welcome { protocol, incarnation, bus } if !self.welcomed => {
                self.receive_welcome(protocol, Identity { incarnation, bus });
            }
            Answer::Present { topics, wildcards } => {
                self.holdings.plan(&topics, &wildcards);
                self.present();
            }
            Answer::Refused(refusal) if !self.welcomed => {
                self.end = Some(match refusal {
                    Refusal::UnknownParticipant { .. } => End::Ended,
                    Refusal::Leaving if self.identity.is_some() => End::Ended,
                    Refusal::Leaving => End::Leaving,
                    other => End::Refused(other),
                });
            }
            Answer::Farewell => self.end = Some(End::Ended),
            answer if self.expected.pop_front() != Some(true) => {
                // Opened for somebody who had given up waiting.
                if let Answer::WildcardOpened { wildcard } = answer {
                    self.end_wildcard(wildcard);
                }
                self.unsent.extend(opened_handle(&answer));
                self.send_closes();
            }
            answer => {
                // Noted here and not by whoever asked: a Hello that is sent before it wakes up must name it.
                if opened_handle(&answer).is_some_and(|handle| self.holds.insert(handle)) {
                    self.holdings.opened(&answer, &fds);
                }
                if let Answer::WildcardOpened { wildcard } = answer {
                    self.pushed.begin(wildcard);
                }
                self.answers.push_back((answer, fds));
            }
        }
    }

    fn receive_welcome(&mut self, protocol: u32, identity: Identity) {
        if protocol != PROTOCOL_VERSION {
            self.end = Some(End::Version(protocol));
        } else if self.identity.is_some_and(|known| known != identity) {
            self.end = Some(End::Ended);
        } else {
            self.identity = Some(identity);
            self.welcomed = true;
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

/// The handle that an answer opened.
fn opened_handle(answer: &Answer) -> Option<HandleRef> {
    match answer {
        Answer::PublisherOpened { info, slot, .. } => Some(HandleRef::Publisher { topic: info.id, slot: *slot }),
        Answer::SubscriberOpened { info, cursor, .. } => {
            Some(HandleRef::Subscriber { topic: info.id, cursor: *cursor })
        }
        Answer::ConsumerOpened { info, group, consumer, .. } => {
            Some(HandleRef::Consumer { topic: info.id, group: group.id, consumer: *consumer })
        }
        Answer::WildcardOpened { wildcard } => Some(HandleRef::Wildcard { wildcard: *wildcard }),
        _ => None,
    }
}

/// Whether there is a handle that may read the topic's arenas.
fn may_read(holds: &HashSet<HandleRef>, wanted: u64) -> bool {
    holds.iter().any(|handle| match handle {
        HandleRef::Publisher { topic, .. }
        | HandleRef::Subscriber { topic, .. }
        | HandleRef::Consumer { topic, .. } => *topic == wanted,
        HandleRef::Wildcard { .. } => false,
    })
}

/// Refuses a socket that somebody else put there.
fn check_peer(place: &Place, socket: &OwnedFd) -> Result<(), ConnectError> {
    let peer =
        socket::peer(socket.as_fd()).map_err(|source| ConnectError::io("cannot see who serves the bus", source))?;
    let us = Uid::effective().as_raw();
    if place.trusts(peer.uid) {
        return Ok(());
    }
    let problem = format!("is served by user {}, expected {us}, root or whose directory it is", peer.uid);
    let mend = "set SHMBUS_DIR to a directory of your own";
    Err(ConnectError::Refused { path: place.socket().to_owned(), problem, mend })
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection whose other end is ours.
    fn connected(directory: &std::path::Path, held: HandleRef) -> (Control, OwnedFd) {
        let place = Place::find("control", Some(directory)).unwrap();
        let (ours, theirs) = socket::pair().unwrap();
        let mut inner = Inner::new(place.clone(), 1);
        (inner.socket, inner.welcomed) = (Some(Arc::new(ours)), true);
        inner.holds.insert(held);
        let line = Arc::new(Line { starter: None, inner: Mutex::new(inner), given_up: Mutex::default() });
        (Control { place, home: Home::here().unwrap(), turn: Mutex::new(0), line }, theirs)
    }

    #[test]
    fn a_handle_that_goes_while_another_thread_looks_is_given_back_when_it_has_looked() {
        let directory = tempfile::tempdir().unwrap();
        let handle = HandleRef::Publisher { topic: 1, slot: 2 };
        let (control, coordinator) = connected(directory.path(), handle);
        let mut buffer = [0; 256];
        // As the thread that watches over the connection does.
        let look = control.line.hold();
        control.release(handle);
        let nothing = socket::recv(coordinator.as_fd(), &mut buffer, 0).map(|packet| packet.len);
        assert_eq!(nothing.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(look);
        let len = socket::recv(coordinator.as_fd(), &mut buffer, 0).unwrap().len;
        let told: Request = postcard::from_bytes(&buffer[..len]).unwrap();
        assert!(matches!(told, Request::Close { handles } if handles == [handle]));
    }
}
