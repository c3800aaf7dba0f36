//! Hints to the processor's cache.

/// Evicts the line that holds `address` from every cache, soon. A hint: nothing but speed depends on it. Does nothing
/// where the processor has no such instruction.
#[inline(always)]
pub(crate) fn evict_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    if has_clflushopt() {
        // SAFETY: CLFLUSHOPT exists (just checked), changes no memory, and acts like a load of the address, which lies in
        // one of our mappings.
        unsafe { std::arch::asm!("clflushopt [{}]", in(reg) address, options(nostack, preserves_flags)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for the line that holds `address`. A hint: nothing but speed depends on it.
#[inline(always)]
pub(crate) fn prefetch_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch changes nothing and faults on no address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Whether the processor knows CLFLUSHOPT (CPUID leaf 7, EBX bit 23); asked once.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn has_clflushopt() -> bool {
    use std::sync::atomic::{AtomicU8, Ordering};
    static KNOWN: AtomicU8 = AtomicU8::new(0);
    // Relaxed: every thread would find out the same.
    match KNOWN.load(Ordering::Relaxed) {
        0 => {
            let has = std::arch::x86_64::__cpuid_count(7, 0).ebx >> 23 & 1 == 1;
            KNOWN.store(1 + u8::from(has), Ordering::Relaxed);
            has
        }
        known => known == 2,
    }
}
