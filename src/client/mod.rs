//! The handles a program works with.

pub(crate) mod bus;
pub(crate) mod control;
pub(crate) mod message;
pub(crate) mod publisher;
pub(crate) mod read_port;
pub(crate) mod subscriber;
pub(crate) mod write_port;
