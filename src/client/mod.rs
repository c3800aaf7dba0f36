//! What programs use: the bus and its handles.

mod bus;
pub(crate) mod control;
mod held;
mod launch;
mod message;
pub(crate) mod publisher;
mod read;
pub(crate) mod subscriber;
mod write;

pub use bus::{Bus, BusOptions};
pub use message::Message;
pub use publisher::{Loan, Publisher};
pub use subscriber::{Start, Subscriber, SubscriberBuilder};
