use crate::coordinator::protocol::*;
use crate::error::*;
use std::os::fd::OwnedFd;
use std::sync::Arc;
pub struct Control;
impl Control {
    pub(crate) fn request(&self, _r: Request) -> Result<(Answer, Vec<OwnedFd>), OpenError> {
        todo!()
    }
    pub(crate) fn arena(&self, _t: u64, _s: u32) -> Option<OwnedFd> {
        todo!()
    }
    pub(crate) fn unexpected(&self, _a: &Answer) -> ConnectError {
        todo!()
    }
}
pub(crate) struct Held;
impl Held {
    pub(crate) fn new(_c: Arc<Control>, _h: HandleRef) -> Held {
        Held
    }
}
impl Drop for Held {
    fn drop(&mut self) {}
}
