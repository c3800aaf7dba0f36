//! Where a publisher's numbers are in the log: a cache of what the log retains, made when it is first asked.

/// Messages with consecutive numbers and sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) number: u64,
    pub(crate) sequence: u64,
    pub(crate) count: u64,
}

/// The runs of one publisher.
#[derive(Default)]
pub(crate) struct Runs {
    /// In the order of numbers.
    runs: Vec<Run>,
    /// Numbers up to this one are in it, as far as the log retained them.
    known: u64,
}

impl Runs {
    /// The sequence of the message with `number`, which is not above `last`; `find` walks the log.
    pub(crate) fn sequence_of(&mut self, number: u64, last: u64, find: impl FnOnce() -> Vec<Run>) -> Option<u64> {
        if number > self.known {
            self.runs = joined(find());
            self.known = last;
        }
        let after = self.runs.partition_point(|run| run.number <= number);
        let run = self.runs[..after].last()?;
        let ahead = number - run.number;
        (ahead < run.count).then(|| run.sequence + ahead)
    }
}

/// The same runs in order, and those that follow each other in one.
fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable_by_key(|run| run.number);
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            // Numbers are what the records say: any publisher of the topic may have written them.
            Some(last)
                if last.number.checked_add(last.count) == Some(run.number)
                    && last.sequence + last.count == run.sequence =>
            {
                last.count += run.count;
            }
            _ => joined.push(run),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_where_they_are() {
        let run = |number, sequence, count| Run { number, sequence, count };
        let mut runs = Runs::default();
        let mut find = |number| runs.sequence_of(number, 9, || vec![run(6, 20, 4), run(3, 10, 1), run(4, 11, 1)]);
        assert_eq!([3, 4, 5, 6, 9].map(&mut find), [Some(10), Some(11), None, Some(20), Some(23)]);
        assert_eq!((find(2), runs.runs.len()), (None, 2));
    }

    #[test]
    fn numbers_that_nobody_has_are_no_runs_end() {
        let run = |number, sequence| Run { number, sequence, count: 2 };
        let mut runs = Runs::default();
        let found =
            runs.sequence_of(7, 8, || vec![run(u64::MAX, 3), run(u64::MAX - 1, 1), run(7, 9), run(u64::MAX, 5)]);
        assert_eq!(found, Some(9));
    }
}
