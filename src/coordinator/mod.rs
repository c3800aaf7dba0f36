//! The coordinator: hands out memory, names and identities, repairs what the dead leave behind. Never on a message's
//! path.

pub(crate) mod directory;
pub(crate) mod limits;
pub(crate) mod memory;
pub(crate) mod protocol;
pub(crate) mod registry;
pub(crate) mod state;

/// A number nobody can expect to meet twice: identifies a bus's life.
pub(crate) fn random_u64() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::hash::RandomState::new().build_hasher().finish()
}
