//! A barrier whose cost falls on the side that is about to sleep.
//!
//! `heavy_barrier` makes the kernel run a full barrier on every processor that runs a registered process;
//! `light_barrier` is then a mere compiler barrier. Together they act as if both sides had executed a full fence
//! (membarrier(2), MEMBARRIER_CMD_GLOBAL_EXPEDITED).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering, compiler_fence, fence};

const GLOBAL_EXPEDITED: libc::c_int = 1 << 1;
const REGISTER_GLOBAL_EXPEDITED: libc::c_int = 1 << 2;

/// Set where light barriers must be real ones, because the kernel did not register us.
static UNREGISTERED: AtomicBool = AtomicBool::new(false);

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: membarrier takes no pointer and changes nothing but ordering.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0u32, 0) == 0 }
}

/// Whether the kernel has the barriers that this file is about.
pub(crate) fn is_available() -> bool {
    register() && membarrier(GLOBAL_EXPEDITED)
}

/// Registers this process for other processes' heavy barriers, once; before it rings a doorbell for the first time.
pub(crate) fn register() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| {
        let registered = membarrier(REGISTER_GLOBAL_EXPEDITED);
        UNREGISTERED.store(!registered, Ordering::Relaxed);
        registered
    })
}

/// The sleeper's half. False where the kernel refuses: the caller must not sleep for long then.
pub(crate) fn heavy_barrier() -> bool {
    fence(Ordering::SeqCst);
    register() && membarrier(GLOBAL_EXPEDITED)
}

/// The ringer's half: free where this process is registered, a real fence elsewhere.
#[inline]
pub(crate) fn light_barrier() {
    // Relaxed: set once by `register`, before this handle existed.
    if UNREGISTERED.load(Ordering::Relaxed) {
        fence(Ordering::SeqCst);
    } else {
        compiler_fence(Ordering::SeqCst);
    }
}
