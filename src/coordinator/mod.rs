//! The coordinator: hands out memory, names and identities, repairs what the dead leave behind. Never on a message's
//! path.

pub(crate) mod memory;
pub(crate) mod protocol;
