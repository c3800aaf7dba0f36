//! The rings and what guards them. One algorithm a file; everything here borrows its memory (`Shared`), so loom lends
//! heap memory to the same code that production runs on segments.

// `pub` below means: visible to the loom models (`crate::model`), not to users.
#![allow(unreachable_pub)]

pub(crate) mod arena;
pub(crate) mod bytes;
pub(crate) mod cursor;
pub(crate) mod doorbell;
pub(crate) mod exclusive;
pub(crate) mod gate;
pub(crate) mod ledger;
pub(crate) mod log;
pub(crate) mod many;
pub(crate) mod notes;
#[cfg(not(loom))]
pub(crate) mod notice;
pub(crate) mod sequence;
pub(crate) mod slot;
pub(crate) mod spsc;
