//! Sleeping on a word that processes share.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

/// Most words that the kernel takes in one wait on several.
pub(crate) const MOST_WORDS: usize = libc::FUTEX_WAITV_MAX as usize;

/// How long a sleep on some of the words lasts where the kernel cannot sleep on all of them.
const SHORT_SLEEP: Duration = Duration::from_millis(2);

/// Sleeps while `word` is `expected`, until woken or `limit` has passed. Wakes early on signals; callers look again.
pub(crate) fn wait(word: &AtomicU32, expected: u32, limit: Duration) {
    let limit = libc::timespec { tv_sec: limit.as_secs() as libc::time_t, tv_nsec: limit.subsec_nanos().into() };
    // SAFETY: the word lives for the call, and the kernel only reads it and the timespec. Every outcome (woken, timed
    // out, interrupted, value changed) is a return the caller handles by looking again.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            expected,
            &raw const limit,
            std::ptr::null::<u32>(),
            0u32,
        );
    }
}

/// Wakes everyone who sleeps on `word`, in any process.
pub(crate) fn wake_all(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address only as a name.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}

/// Clears `bits` of `word`, which are among its lowest 11, and wakes everyone who sleeps on it, in any process. Both is one step to
/// who goes to sleep, and one system call: a signal that stops or kills the caller takes effect before or after it.
pub(crate) fn clear_and_wake_all(word: &AtomicU32, bits: u32) {
    let everybody = i32::MAX;
    // The word whose sleepers are woken and the word that is changed are the same; the comparison serves to wake some more.
    let clear = libc::FUTEX_OP(libc::FUTEX_OP_ANDN, bits as i32, libc::FUTEX_OP_CMP_EQ, 0);
    // SAFETY: the word lives for the call, and the kernel changes it atomically, as we do elsewhere.
    let woken = unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE_OP, everybody, 0usize, word.as_ptr(), clear)
    };
    if woken < 0 {
        // A filter that does not know the call: two steps have to do. Relaxed: the caller has what it needs of ordering.
        word.fetch_and(!bits, Ordering::Relaxed);
        wake_all(word);
    }
}

/// Sleeps while every word is what is expected of it, until one is woken or `limit` has passed. Wakes early for other
/// reasons too; callers look again. Kernels before 5.16 cannot sleep on several words, and none on more than 128: there
/// it sleeps on the first ones, for 2 ms at most.
pub(crate) fn wait_any(words: &[(&AtomicU32, u32)], limit: Duration) {
    static MISSING: AtomicBool = AtomicBool::new(false);
    if words.is_empty() {
        return std::thread::sleep(limit);
    }
    // Relaxed: a hint; who misses it finds out by itself.
    if !MISSING.load(Ordering::Relaxed) {
        let limit = if words.len() > MOST_WORDS { limit.min(SHORT_SLEEP) } else { limit };
        match wait_vector(&words[..words.len().min(MOST_WORDS)], limit) {
            // No such call (or a filter that does not know it).
            libc::ENOSYS | libc::EPERM => MISSING.store(true, Ordering::Relaxed),
            _ => return,
        }
    }
    let (word, expected) = words[0];
    wait(word, expected, limit.min(SHORT_SLEEP));
}

/// The error number of `futex_waitv`, 0 for a wake.
fn wait_vector(words: &[(&AtomicU32, u32)], limit: Duration) -> i32 {
    let entry = |(word, expected): &(&AtomicU32, u32)| {
        // SAFETY: a structure of plain numbers, for which zeros are valid.
        let mut entry: libc::futex_waitv = unsafe { std::mem::zeroed() };
        entry.val = u64::from(*expected);
        entry.uaddr = word.as_ptr() as u64;
        entry.flags = libc::FUTEX2_SIZE_U32 as u32;
        entry
    };
    let entries: Vec<libc::futex_waitv> = words.iter().map(entry).collect();
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return libc::ENOSYS };
    let until = now + TimeSpec::from_duration(limit);
    // SAFETY: the words live for the call, and the kernel only reads them, the entries and the timespec. Every outcome but
    // a missing call is a return that the caller handles by looking again.
    let woken = unsafe {
        libc::syscall(
            libc::SYS_futex_waitv,
            entries.as_ptr(),
            entries.len() as u32,
            0u32,
            std::ptr::from_ref(until.as_ref()),
            libc::CLOCK_MONOTONIC,
        )
    };
    if woken >= 0 { 0 } else { nix::errno::Errno::last_raw() }
}
