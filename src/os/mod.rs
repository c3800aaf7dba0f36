//! System calls, one file a facility. Nothing else in the crate calls the kernel for these.

pub(crate) mod futex;
pub(crate) mod membarrier;
pub(crate) mod memfd;
