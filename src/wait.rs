//! Waiting: spin a little, then sleep in the kernel.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::ring::doorbell::{Doorbell, arm_all, sleep_any};
use crate::shm::shared::Shared;
use crate::sync::pause;

/// How a handle waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// Spin for about the cost of one wake-up (50 µs), then sleep until rung. On a single processor: sleep at once.
    #[default]
    Adaptive,
    /// Spin for ever: the lowest latency, one processor used up.
    Spin,
    /// Sleep at once.
    Park,
}

impl Wait {
    /// Whether to spin before sleeping.
    fn spins(self) -> bool {
        match self {
            Wait::Spin => true,
            Wait::Park => false,
            Wait::Adaptive => processors() > 1,
        }
    }
}

/// A wake-up costs about this much; spinning longer than what it would save is waste.
const SPIN: Duration = Duration::from_micros(50);

/// Between two looks for what rings no bell.
pub(crate) const MOMENT: Duration = Duration::from_millis(5);

/// Messages that one look passes over at most because they are not for who looks: whoever publishes them, however fast, has no
/// part in deadlines, and delays nobody else that the same thread serves.
pub(crate) const PASSED_OVER: usize = 64;

/// Polls between two looks at the clock, at most.
const POLLS_PER_LOOK: u32 = 64;

/// How many times more of them there are after those before took hardly any time.
const MORE_POLLS: u32 = 8;

/// Polls until there is a result or the deadline has passed. `state` is what `poll` works on and what owns the bell.
pub(crate) fn until<S, R>(
    state: &mut S,
    wait: Wait,
    deadline: Option<Instant>,
    bell: impl Fn(&S) -> &Doorbell,
    mut poll: impl FnMut(&mut S) -> Option<R>,
) -> Option<R> {
    if wait.spins()
        && let Some(outcome) = spin(state, wait, deadline, &mut poll)
    {
        return outcome;
    }
    park(state, deadline, bell, poll)
}

/// The same without a bell: looks every few milliseconds once it has spun.
pub(crate) fn until_seen<S, R>(
    state: &mut S,
    wait: Wait,
    deadline: Option<Instant>,
    mut poll: impl FnMut(&mut S) -> Option<R>,
) -> Option<R> {
    if wait.spins()
        && let Some(outcome) = spin(state, wait, deadline, &mut poll)
    {
        return outcome;
    }
    loop {
        if let Some(result) = poll(state) {
            return Some(result);
        }
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return None;
        }
        std::thread::sleep(left.map_or(MOMENT, |left| left.min(MOMENT)));
    }
}

/// What a look at several things showed.
pub enum Look<R> {
    /// The result that was waited for.
    Found(R),
    /// Nothing.
    Nothing,
    /// Nothing, but something may come that rings no bell: look again before so long has passed.
    Within(Duration),
    /// Nothing, but there are other bells to wait on now: arm those before sleeping.
    OtherBells,
}

/// The same on several bells: those that `state` has each time it is about to sleep.
pub(crate) fn until_any<S: ?Sized, R>(
    state: &mut S,
    wait: Wait,
    deadline: Option<Instant>,
    bells: impl Fn(&S, &mut Vec<Shared<Doorbell>>),
    mut look: impl FnMut(&mut S) -> Look<R>,
) -> Option<R> {
    let mut poll = |state: &mut &mut S| match look(state) {
        Look::Found(result) => Some(result),
        Look::Nothing | Look::Within(_) | Look::OtherBells => None,
    };
    if wait.spins()
        && let Some(outcome) = spin(&mut &mut *state, wait, deadline, &mut poll)
    {
        return outcome;
    }
    loop {
        // As long as there is more to look at, nobody need ring.
        loop {
            match look(state) {
                Look::Found(result) => return Some(result),
                Look::Within(again) if again.is_zero() => {
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        return None;
                    }
                }
                _ => break,
            }
        }
        let mut armed_bells = Vec::new();
        bells(state, &mut armed_bells);
        let armed = arm_all(&armed_bells);
        let again = match look(state) {
            Look::Found(result) => return Some(result),
            // Whoever brings new ones all the time moves no deadline.
            Look::OtherBells => Some(Duration::ZERO),
            Look::Within(again) => Some(again),
            Look::Nothing => None,
        };
        let limit = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if limit.is_some_and(|limit| limit.is_zero()) {
            return None;
        }
        if again == Some(Duration::ZERO) {
            continue;
        }
        // Still those to wait on: `look` would have said otherwise.
        sleep_any(&armed_bells, armed, limit.into_iter().chain(again).min());
    }
}

/// Spins until there is a result or the deadline has passed; `None`: it is time to sleep.
fn spin<S, R>(
    state: &mut S,
    wait: Wait,
    deadline: Option<Instant>,
    poll: &mut impl FnMut(&mut S) -> Option<R>,
) -> Option<Option<R>> {
    // Set at the first look at the clock: what comes with the first poll should not wait for it.
    let (mut spin_end, mut looked_at) = (None, None);
    let mut polls = 1;
    loop {
        for _ in 0..polls {
            if let Some(result) = poll(state) {
                return Some(Some(result));
            }
            pause();
        }
        if wait == Wait::Spin && deadline.is_none() {
            continue;
        }
        let now = Instant::now();
        if deadline.is_some_and(|deadline| now >= deadline) {
            return Some(None);
        }
        if wait == Wait::Adaptive && now >= *spin_end.get_or_insert(now + SPIN) {
            return None;
        }
        // What a poll costs may be up to others; before the second look nothing is known about it.
        let is_cheap = looked_at.replace(now).is_some_and(|last| now - last < SPIN / MORE_POLLS);
        polls = if is_cheap { (polls * MORE_POLLS).min(POLLS_PER_LOOK) } else { 1 };
    }
}

/// Sleeps until rung, looking again each time; see [`Doorbell`] for why no ring is missed.
fn park<S, R>(
    state: &mut S,
    deadline: Option<Instant>,
    bell: impl Fn(&S) -> &Doorbell,
    mut poll: impl FnMut(&mut S) -> Option<R>,
) -> Option<R> {
    loop {
        if let Some(result) = poll(state) {
            return Some(result);
        }
        let armed = bell(state).arm();
        if let Some(result) = poll(state) {
            return Some(result);
        }
        let limit = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if limit.is_some_and(|limit| limit.is_zero()) {
            return None;
        }
        bell(state).sleep(armed, limit);
    }
}

fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::thread::sleep;

    #[test]
    fn a_deadline_waits_for_no_more_than_one_long_poll() {
        let (deadline, mut long_ones) = (Instant::now() + Duration::from_millis(30), 0);
        let seen = until_seen(&mut long_ones, Wait::Spin, Some(deadline), |long_ones| {
            *long_ones += 1;
            sleep(Duration::from_millis(20));
            None::<()>
        });
        assert_eq!(seen, None);
        assert!(long_ones <= 2, "{long_ones} polls of 20 ms each in 30 ms");
    }

    #[test]
    fn bells_that_are_others_all_the_time_move_no_deadline() {
        let deadline = Instant::now() + Duration::from_millis(10);
        for wait in [Wait::Adaptive, Wait::Park] {
            let seen = until_any(&mut (), wait, Some(deadline), |_, _| {}, |_| Look::<()>::OtherBells);
            assert_eq!(seen, None);
        }
    }
}
