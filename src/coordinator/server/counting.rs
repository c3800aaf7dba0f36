//! The status of a topic whose ledgers are long: they are counted between requests, so that nobody waits for it but who asked.

use std::io;
use std::time::Instant;

use super::Server;
use crate::coordinator::limits::LOOK;
use crate::coordinator::protocol::{Answer, Request};

/// A status that somebody waits for.
pub(super) struct Asked {
    incarnation: u64,
    request: Request,
    /// What was counted after that serves him.
    since: Instant,
}

impl Server {
    /// Answers later. The client is not listened to until then.
    pub(super) fn answer_once_counted(&mut self, id: u64, incarnation: u64, request: Request) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.waits = true;
        self.counting.insert((client.peer.uid, id), Asked { incarnation, request, since: Instant::now() });
    }

    /// The client has gone, and does not wait any more.
    pub(super) fn stop_counting_for(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.waits = false;
            self.counting.remove(&(client.peer.uid, id));
        }
    }

    /// Counts for a while, for each user in turn, and answers those for whom all is counted. Who asks while others wait shares
    /// what is counted from then on.
    pub(super) fn go_on_counting(&mut self) -> io::Result<()> {
        let end = Instant::now() + LOOK;
        while let Some((uid, id)) = self.counts_next() {
            self.counted_for = uid;
            let Some(asked) = self.counting.get(&(uid, id)).filter(|_| self.clients.contains_key(&id)) else {
                self.counting.remove(&(uid, id));
                continue;
            };
            if !self.estate.count_ahead(asked.incarnation, &asked.request, asked.since, end) {
                return Ok(());
            }
            let answer = self.estate.counted_status(asked.incarnation, &asked.request, asked.since);
            self.stop_counting_for(id);
            self.send(id, &answer.unwrap_or_else(Answer::Refused), Vec::new())?;
            if Instant::now() >= end {
                break;
            }
        }
        if self.counting.is_empty() {
            self.estate.forget_counts();
        }
        Ok(())
    }

    /// Whose status it is to count for: another user's than the last one, if there is one.
    fn counts_next(&self) -> Option<(u32, u64)> {
        let others = self.counting.range((self.counted_for.wrapping_add(1), 0)..).next();
        others.or(self.counting.first_key_value()).map(|(key, _)| *key)
    }
}
