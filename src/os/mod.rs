//! System calls, one file a facility. Nothing else in the crate calls the kernel for these.

pub(crate) mod address_space;
pub(crate) mod cache;
pub(crate) mod clock;
pub(crate) mod event;
pub(crate) mod futex;
pub(crate) mod home;
pub(crate) mod lock;
pub(crate) mod membarrier;
pub(crate) mod memfd;
pub(crate) mod memory_size;
pub(crate) mod pidfd;
pub(crate) mod probe;
pub(crate) mod process;
pub(crate) mod socket;
pub(crate) mod systemd;
