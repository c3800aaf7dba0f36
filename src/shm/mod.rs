//! Shared memory: the only place where raw pointers are born.

pub(crate) mod layout;
#[cfg(not(loom))]
pub(crate) mod notice;
#[cfg(not(loom))]
pub(crate) mod segment;
pub(crate) mod shared;
#[cfg(not(loom))]
pub(crate) mod topic;
