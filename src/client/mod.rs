//! What programs use: the bus and its handles.

mod bus;
pub(crate) mod control;
mod launch;

pub use bus::{Bus, BusOptions};
