//! Handles that are given back: closed by whoever has the connection, or has it next.

use std::ops::{Deref, DerefMut};
use std::sync::MutexGuard;

use super::{Control, Inner, Line, lock};
use crate::coordinator::protocol::{HandleRef, Request};

/// A hold on `inner`. What was given up before is closed before anything else is said, what is given up meanwhile when it is let
/// go: nobody else would do it.
pub(super) struct Hold<'a> {
    line: &'a Line,
    /// `None` while it is let go.
    inner: Option<MutexGuard<'a, Inner>>,
}

impl Control {
    /// Gives a handle back. Never waits: if the coordinator is away or busy with us, it learns of it later.
    pub(crate) fn release(&self, handle: HandleRef) {
        if self.check_process().is_ok() {
            lock(&self.line.given_up).push(handle);
            self.line.close_given_up();
        }
    }
}

impl Line {
    /// Waits for whoever has `inner`, for a moment.
    pub(super) fn hold(&self) -> Hold<'_> {
        self.held(lock(&self.inner))
    }

    /// `None`: somebody else has it.
    pub(super) fn try_hold(&self) -> Option<Hold<'_>> {
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

impl Inner {
    /// A handle is not ours any more.
    pub(super) fn let_go(&mut self, handle: HandleRef) {
        if self.holds.remove(&handle)
            && let Some(topic) = self.holdings.closed(handle)
        {
            self.drop_arenas(topic);
        }
    }

    /// Nobody asks for arenas of a topic on which there is no handle any more.
    fn drop_arenas(&mut self, topic: u64) {
        let all = (topic, 0)..=(topic, u32::MAX);
        while let Some((&arena, _)) = self.arenas.range(all.clone()).next() {
            self.arenas.remove(&arena);
        }
        self.missed_arenas.retain(|(of, _)| *of != topic);
    }

    /// Tells the coordinator, now or with the next Hello, that these handles are gone.
    fn close(&mut self, handles: &[HandleRef]) {
        // Who gathers may have asked for what goes now, and it may be nobody else's.
        self.receive_all();
        for handle in handles {
            self.let_go(*handle);
            match *handle {
                HandleRef::Wildcard { wildcard } => self.end_wildcard(wildcard),
                subscriber => self.pushed.forget(subscriber),
            }
        }
        if self.socket.is_none() {
            // The Hello leaves them out. If that is not possible now, the next one will.
            let _ = self.connect();
            return;
        }
        self.unsent.extend_from_slice(handles);
        self.send_closes();
    }

    /// A wildcard subscription's subscribers go with it, on the coordinator's side too.
    pub(super) fn end_wildcard(&mut self, wildcard: u64) {
        for handle in self.pushed.end(wildcard) {
            self.let_go(handle);
        }
    }

    pub(super) fn send_closes(&mut self) {
        if self.unsent.is_empty() {
            return;
        }
        let handles = std::mem::take(&mut self.unsent);
        match self.send(&Request::Close { handles: handles.clone() }, 0, false) {
            Ok(true) => {}
            // The watching thread is not asleep before all is presented.
            _ if self.holdings.next().is_some() => self.unsent = handles,
            // Nobody would come back to it when there is room; the next Hello leaves them out.
            _ => self.hang_up(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::coordinator::directory::Place;
    use crate::os::home::Home;
    use crate::os::socket;

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
