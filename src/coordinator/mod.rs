//! The coordinator: hands out memory, names and identities, repairs what the dead leave behind. Never on a message's
//! path.

pub(crate) mod adoption;
mod burial;
pub(crate) mod connection;
pub(crate) mod directory;
pub(crate) mod estate;
pub(crate) mod keeper;
pub(crate) mod limits;
pub(crate) mod link;
pub(crate) mod memory;
mod names;
pub(crate) mod notices;
pub(crate) mod protocol;
pub(crate) mod registry;
pub(crate) mod roles;
mod serve;
pub(crate) mod server;
pub(crate) mod state;

pub use roles::Role;
pub use serve::{ServeOptions, serve};

/// A number nobody can expect to meet twice: identifies a bus's life.
pub(crate) fn random_u64() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}
