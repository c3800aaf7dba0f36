//! A consumer's own memory for the payloads it has in hand.

use zerocopy::IntoBytes;

use crate::client::blocks::Block;

/// Payload copies, one behind the other, each aligned for every payload type. Grows to the largest batch and stays so.
#[derive(Default)]
pub(super) struct Copies {
    blocks: Vec<Block>,
    used: usize,
}

/// Where a copy lies: its first block and its length in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Copy {
    block: usize,
    len: usize,
}

impl Copies {
    /// Forgets all copies.
    #[inline]
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    /// Forgets `copy`, the one made last.
    #[inline]
    pub(super) fn undo(&mut self, copy: Copy) {
        self.used = copy.block;
    }

    /// Room for `len` bytes, to be filled by the caller.
    #[inline]
    pub(super) fn add(&mut self, len: usize) -> (Copy, &mut [u8]) {
        let copy = Copy { block: self.used, len };
        self.used += Block::count(len);
        if self.blocks.len() < self.used {
            self.blocks.resize(self.used, Block::ZERO);
        }
        (copy, &mut self.blocks[copy.block..].as_mut_bytes()[..len])
    }

    /// The bytes of a copy.
    #[inline]
    pub(super) fn bytes(&self, copy: Copy) -> &[u8] {
        &self.blocks[copy.block..].as_bytes()[..copy.len]
    }
}
