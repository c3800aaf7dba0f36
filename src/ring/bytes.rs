//! Copies between private bytes and shared words. Relaxed word accesses: the commit orders them, and a copy that races
//! with a writer is merely stale, never undefined.

use crate::sync::{AtomicU64, Ordering};

/// Copies `bytes` into `words`; the last word is padded with zeros. Words beyond stay as they are.
#[inline]
pub(crate) fn store_bytes(words: &[AtomicU64], bytes: &[u8]) {
    let words = &words[..bytes.len().div_ceil(8)];
    let (whole, rest) = bytes.as_chunks::<8>();
    for (to, from) in words.iter().zip(whole) {
        to.store(u64::from_ne_bytes(*from), Ordering::Relaxed);
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        words[whole.len()].store(u64::from_ne_bytes(last), Ordering::Relaxed);
    }
}

/// Copies the first bytes of `words` out.
#[inline]
pub(crate) fn load_bytes(words: &[AtomicU64], bytes: &mut [u8]) {
    let words = &words[..bytes.len().div_ceil(8)];
    let (whole, rest) = bytes.as_chunks_mut::<8>();
    let count = whole.len();
    for (to, from) in whole.iter_mut().zip(words) {
        *to = from.load(Ordering::Relaxed).to_ne_bytes();
    }
    if !rest.is_empty() {
        rest.copy_from_slice(&words[count].load(Ordering::Relaxed).to_ne_bytes()[..rest.len()]);
    }
}
