//! A place on a topic, given back when its handle goes.

use std::sync::Arc;

use crate::client::control::Control;
use crate::coordinator::protocol::HandleRef;

/// Keeps a place on a topic, and the control connection, for a handle.
pub(crate) struct Held {
    control: Arc<Control>,
    handle: HandleRef,
}

impl Held {
    pub(crate) fn new(control: Arc<Control>, handle: HandleRef) -> Self {
        Held { control, handle }
    }

    pub(crate) fn control(&self) -> &Control {
        &self.control
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.control.release(self.handle);
    }
}
