//! shmbus: a message bus for the processes of one host.
//!
//! Publishers and subscribers share memory-mapped lock-free rings; a message costs a few cache-line transfers and no
//! system call. A coordinator hands out memory and identities and repairs what the dead leave behind; it is never on
//! a message's path.

#[cfg(not(loom))]
mod client;
#[cfg(not(loom))]
pub mod coordinator;
mod error;
#[cfg(not(loom))]
mod os;
pub mod ring;
mod shm;
mod sync;
mod topic;

#[cfg(not(loom))]
pub use client::{Bus, BusOptions};
#[cfg(not(loom))]
pub use coordinator::protocol::{PublisherStatus, SubscriberStatus, TopicStatus};
pub use error::{ConnectError, NameError, OpenError, Refusal};
pub use topic::{Full, Mode, Payload, Schema, Topic, TopicOptions};
