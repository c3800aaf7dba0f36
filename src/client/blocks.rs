//! Private memory for payloads, aligned for every payload type.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::topic::MAX_PAYLOAD_ALIGN;

/// Memory is had in pieces of this size and alignment; a slice of them is so many bytes.
#[repr(C, align(32))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
pub(crate) struct Block([u8; Block::BYTES]);

const _: () = assert!(align_of::<Block>() == MAX_PAYLOAD_ALIGN && size_of::<Block>() == Block::BYTES);

impl Block {
    pub(crate) const BYTES: usize = MAX_PAYLOAD_ALIGN;
    pub(crate) const ZERO: Block = Block([0; Block::BYTES]);

    /// How many it takes for `len` bytes.
    pub(crate) const fn count(len: usize) -> usize {
        len.div_ceil(Block::BYTES)
    }
}

/// Copies `parts` into one allocation, each to a block's beginning.
pub(crate) fn copy_of<const N: usize>(parts: [&[u8]; N]) -> Box<[Block]> {
    let mut blocks = Vec::with_capacity(parts.iter().map(|part| Block::count(part.len())).sum());
    for part in parts {
        let (whole, rest) = part.as_chunks::<{ Block::BYTES }>();
        blocks.extend(whole.iter().map(|bytes| Block(*bytes)));
        if !rest.is_empty() {
            let mut last = Block::ZERO;
            last.0[..rest.len()].copy_from_slice(rest);
            blocks.push(last);
        }
    }
    blocks.into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_aligned_behind_each_other() {
        let (first, second) = ([7u8; 65], [9u8; 64]);
        let blocks = copy_of([&first, &[], &second]);
        assert_eq!(blocks.len(), 5);
        let bytes = blocks.as_bytes();
        assert_eq!((&bytes[..65], &bytes[96..]), (&first[..], &second[..]));
        assert_eq!(bytes.as_ptr().addr() % MAX_PAYLOAD_ALIGN, 0);
        assert!(copy_of([]).is_empty());
    }
}
