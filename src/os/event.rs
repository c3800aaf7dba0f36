//! A descriptor that is readable when somebody says so.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// See the module's documentation. Nothing here ever waits.
#[derive(Debug)]
pub(crate) struct Event(EventFd);

impl Event {
    pub(crate) fn new() -> io::Result<Event> {
        Ok(Event(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Makes it readable.
    pub(crate) fn set(&self) {
        // It fails where the count is at its end: readable as well.
        let _ = self.0.write(1);
    }

    /// Makes it not readable.
    pub(crate) fn clear(&self) {
        // It fails where it is not readable.
        let _ = self.0.read();
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
