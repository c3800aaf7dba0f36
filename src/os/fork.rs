//! Noticing that a handle has come into another process by a fork.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

/// Forks between the first look and this process. Only the forked child's copy changes.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// A number that is another one in a forked child. Costs one load; asking the kernel for the process would cost a call.
#[inline]
pub(crate) fn generation() -> u64 {
    // Relaxed: the child starts with the one thread that changes it.
    FORKS.load(Ordering::Relaxed)
}

/// Begins to count; to be called before the first number that matters is taken.
pub(crate) fn watch() {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        // SAFETY: the handler does one atomic addition, which is allowed between fork and exec. If the C library has no
        // memory for the registration, forks go unnoticed here; control requests still notice.
        unsafe { libc::pthread_atfork(None, None, Some(count)) };
    });
}

unsafe extern "C" fn count() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}
