//! In which process a handle was opened, told without a system call: a forked child has a copy of every handle, and none
//! of them is its own.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

const MARK_BYTES: NonZeroUsize = NonZeroUsize::new(size_of::<AtomicU32>()).expect("not zero");

const HERE: u32 = 1;

/// The mark of this process; its parent's, wiped, in a child that has not opened anything yet.
static CURRENT: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());

/// The process that opened a handle.
///
/// Its mark lies on a page that the kernel hands to forked children as zeros (`MADV_WIPEONFORK`), however they are
/// forked: looking at it costs two loads and a branch. A child that opens handles of its own gets a page of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Home {
    mark: &'static AtomicU32,
    pid: u32,
}

impl Home {
    /// This process.
    pub(crate) fn here() -> io::Result<Home> {
        // Acquire: A-HOME pairs with R-HOME below: the mark was set before its place was made known.
        let known = CURRENT.load(Ordering::Acquire);
        // SAFETY: whatever CURRENT points to was mapped below and is never unmapped again.
        if let Some(mark) = unsafe { known.as_ref() }
            && mark.load(Ordering::Relaxed) == HERE
        {
            return Ok(Home { mark, pid: std::process::id() });
        }
        let new = new_mark()?;
        // Release: R-HOME pairs with A-HOME; on failure Acquire: A-HOME, as above.
        match CURRENT.compare_exchange(known, new.as_ptr(), Ordering::Release, Ordering::Acquire) {
            // SAFETY: just mapped, and kept for good.
            Ok(_) => Ok(Home { mark: unsafe { new.as_ref() }, pid: std::process::id() }),
            Err(_) => {
                // SAFETY: nobody has learnt of this page.
                unsafe { munmap(new.cast(), MARK_BYTES.get())? };
                Home::here()
            }
        }
    }

    /// Whether this is the process that opened the handle.
    #[inline(always)]
    pub(crate) fn is_here(self) -> bool {
        // Relaxed: it changes by forking alone, and the child has one thread then.
        let here = self.mark.load(Ordering::Relaxed) == HERE;
        if !here {
            unlikely();
        }
        here
    }

    /// The process that opened the handle.
    pub(crate) fn pid(self) -> u32 {
        self.pid
    }

    /// For what cannot return an error: a borrowed payload.
    #[inline(always)]
    pub(crate) fn assert_here(self, what: &str) {
        if !self.is_here() {
            self.refuse(what);
        }
    }

    #[cold]
    fn refuse(self, what: &str) -> ! {
        let (opened_by, pid) = (self.pid, std::process::id());
        panic!(
            "this {what} belongs to process {opened_by}, which forked; open the bus again in the child (process {pid})"
        );
    }
}

/// Tells the compiler which way it need not care about.
#[cold]
fn unlikely() {}

/// A page of its own that forked children find wiped.
fn new_mark() -> io::Result<NonNull<AtomicU32>> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new private mapping at a place of the kernel's choice disturbs nobody.
    let page = unsafe { mmap_anonymous(None, MARK_BYTES, protection, MapFlags::MAP_PRIVATE)? };
    // SAFETY: the page was just mapped by us, and the advice says nothing about this process.
    if let Err(error) = unsafe { madvise(page, MARK_BYTES.get(), MmapAdvise::MADV_WIPEONFORK) } {
        // SAFETY: as above; nobody else knows it.
        unsafe { munmap(page, MARK_BYTES.get())? };
        return Err(error.into());
    }
    let mark = page.cast::<AtomicU32>();
    // SAFETY: mapped, zeroed and page-aligned.
    unsafe { mark.as_ref() }.store(HERE, Ordering::Relaxed);
    Ok(mark)
}
