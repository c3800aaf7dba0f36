//! A barrier whose cost falls on the side that is about to sleep.
//!
//! `heavy_barrier` makes the kernel run a full barrier on every processor that runs a registered process;
//! `light_barrier` is then a mere compiler barrier. Together they act as if both sides had executed a full fence
//! (membarrier(2), MEMBARRIER_CMD_GLOBAL_EXPEDITED).

use std::sync::OnceLock;
use std::sync::atomic::{Ordering, compiler_fence, fence};

const GLOBAL_EXPEDITED: libc::c_int = 1 << 1;
const REGISTER_GLOBAL_EXPEDITED: libc::c_int = 1 << 2;

fn membarrier(command: libc::c_int) -> bool {
    // SAFETY: membarrier takes no pointer and changes nothing but ordering.
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0u32, 0) == 0 }
}

/// Registers this process for other processes' heavy barriers, once. False where the kernel refuses.
pub(crate) fn register() -> bool {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    *REGISTERED.get_or_init(|| membarrier(REGISTER_GLOBAL_EXPEDITED))
}

/// The sleeper's half. False where the kernel refuses: the caller must not sleep for long then.
pub(crate) fn heavy_barrier() -> bool {
    fence(Ordering::SeqCst);
    register() && membarrier(GLOBAL_EXPEDITED)
}

/// The ringer's half: free where this process is registered, a real fence elsewhere.
#[inline]
pub(crate) fn light_barrier() {
    if register() { compiler_fence(Ordering::SeqCst) } else { fence(Ordering::SeqCst) }
}
