//! Payloads that are read where they lie.

use std::ptr::NonNull;

use super::{BAD_LENGTH, Buffer, Lengths, payload_at};
use crate::error::RecvError;
use crate::ring::arena::Arena;
use crate::ring::slot::{Slot, Word};
use crate::shm::topic::SharedInfo;

/// A small payload where it lies, whole until the reader gives its slot back. Copied only where the slot's alignment
/// does not do for the payload's type.
#[inline]
pub(super) fn inline_in_place<const W: usize>(
    slot: &Slot<W>,
    word: Word,
    lengths: Lengths,
    in_place: bool,
    buffer: &mut Buffer,
) -> Result<NonNull<[u8]>, RecvError> {
    let len = word.length();
    if len > Slot::<W>::INLINE_BYTES || !lengths.allow(len as u64) {
        return Err(BAD_LENGTH);
    }
    if !in_place {
        slot.read(buffer.bytes_mut(len));
        return Ok(buffer.filled(len));
    }
    Ok(payload_at(slot.pointer(), len))
}

/// An arena payload where it lies, whole until the reader gives its slot back.
pub(super) fn span_in_place<const W: usize>(
    slot: &Slot<W>,
    arena: &Arena,
    lengths: Lengths,
) -> Result<NonNull<[u8]>, RecvError> {
    let span = slot.read_span();
    if !arena.contains(span) || !lengths.allow(span.len) {
        return Err(BAD_LENGTH);
    }
    Ok(payload_at(arena.pointer(span), span.len as usize))
}

/// Whether a slot's payload, which lies 8 bytes into it, is aligned for the payload's type.
pub(super) fn fits_slots(info: &SharedInfo) -> bool {
    info.options.schema.as_ref().is_none_or(|schema| schema.align_bytes <= 8)
}
