//! Asking the coordinator, and telling it something.

use std::io;
use std::os::fd::AsFd;
use std::sync::{MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Control, Granted, Inner, lock, pause};
use crate::coordinator::protocol::{Answer, MAX_PACKET_BYTES, Request};
use crate::error::{ConnectError, OpenError};
use crate::os::socket;

/// How long a request waits for its answer, a restart of the coordinator included.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two looks whether another thread still has the turn, for who has a deadline.
const TURN_PAUSE: Duration = Duration::from_millis(1);

impl Control {
    /// Asks the coordinator and waits for the answer; a refusal is an error. If the coordinator dies meanwhile, its
    /// successor is asked.
    pub(crate) fn request(&self, request: &Request) -> Result<Granted, OpenError> {
        self.check_process()?;
        let deadline = Instant::now() + PATIENCE;
        self.ask(lock(&self.turn), request, 0, deadline)
    }

    /// The same for who has no longer than until `deadline`. `None`: that has passed.
    pub(crate) fn request_until(&self, request: &Request, deadline: Instant) -> Result<Option<Granted>, OpenError> {
        self.check_process()?;
        let turn = loop {
            match self.turn.try_lock() {
                Ok(turn) => break turn,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Ok(None),
                Err(TryLockError::WouldBlock) => thread::sleep(TURN_PAUSE),
            }
        };
        let answer = self.exchange(request, 0, deadline.min(Instant::now() + PATIENCE));
        drop(turn);
        match answer {
            Err(ConnectError::Timeout { .. }) if Instant::now() >= deadline => Ok(None),
            answer => granted(answer?).map(Some),
        }
    }

    /// The same for what is to be done once: a successor of the coordinator that had done it says so, and does not find that it has
    /// been done already.
    pub(crate) fn request_once(&self, request: &Request) -> Result<Granted, OpenError> {
        self.check_process()?;
        let deadline = Instant::now() + PATIENCE;
        let mut turn = lock(&self.turn);
        *turn += 1;
        let once = *turn;
        self.ask(turn, request, once, deadline)
    }

    /// The wait for the turn counts: who asks behind others waits no longer than they.
    fn ask(
        &self,
        turn: MutexGuard<'_, u64>,
        request: &Request,
        once: u64,
        deadline: Instant,
    ) -> Result<Granted, OpenError> {
        let answer = self.exchange(request, once, deadline);
        if let Err(ConnectError::Timeout { .. }) = answer {
            // The answer may come when nobody reads. What it opens is left out of the next Hello, and so given back.
            let mut inner = self.line.hold();
            if !inner.expected.is_empty() {
                inner.hang_up();
            }
        }
        drop(turn);
        granted(answer?)
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

    /// Asks and waits for the answer until `deadline`. The caller has the turn.
    pub(super) fn exchange(&self, request: &Request, once: u64, deadline: Instant) -> Result<Granted, ConnectError> {
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
            // Who got the turn when its time was over is told so, and that holds.
            let is_late = Instant::now() >= deadline;
            if !is_late && sent_on != Some(inner.generation) && inner.welcomed && inner.send(request, once, true)? {
                sent_on = Some(inner.generation);
            }
            if is_late {
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
}

/// A refusal is an error.
fn granted(answer: Granted) -> Result<Granted, OpenError> {
    match answer {
        (Answer::Refused(refusal), _) => Err(refusal.into()),
        granted => Ok(granted),
    }
}

impl Inner {
    /// Sends a request; false when it does not fit now or the connection broke.
    pub(super) fn send(&mut self, request: &Request, once: u64, waited_for: bool) -> Result<bool, ConnectError> {
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
                self.hang_up();
                Ok(false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::{Arc, Mutex};

    use super::super::Line;
    use super::*;
    use crate::coordinator::directory::Place;
    use crate::os::home::Home;

    #[test]
    fn what_is_told_to_be_late_before_it_was_asked_is_not_asked() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::find("control", Some(directory.path())).unwrap();
        let (ours, coordinator) = socket::pair().unwrap();
        let mut inner = Inner::new(place.clone(), 1);
        (inner.socket, inner.welcomed) = (Some(Arc::new(ours)), true);
        let line = Arc::new(Line { starter: None, inner: Mutex::new(inner), given_up: Mutex::default() });
        let control = Control { place, home: Home::here().unwrap(), turn: Mutex::new(0), line };
        let request = Request::RemoveTopic { topic: "t".to_owned(), force: true };
        // Who got its turn when its time was over.
        let answer = control.exchange(&request, 1, Instant::now());
        assert!(matches!(answer, Err(ConnectError::Timeout { .. })));
        let asked = socket::recv(coordinator.as_fd(), &mut [0; 256], 0).map(|packet| packet.len);
        assert_eq!(asked.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
