//! Every interleaving of a producer and a consumer, including the reorderings a weak memory allows.
//!
//! The page is made of loom's atomics, the code under test is the code that ships. Removing a
//! fence from `publish` or `rearm` makes `no_wakeup_is_lost` fail.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::thread;
use ring_protocol::SharedPage;
use ring_protocol::bytes::{ByteRing, Reader, Writer};
use ring_protocol::ring::{BackRing, FrontRing, Layout};

struct LoomPage(Vec<AtomicU32>);

impl LoomPage {
    fn new(words: usize) -> Self {
        Self((0..words).map(|_| AtomicU32::new(0)).collect())
    }
}

/// Byte copies are whole words here: the tests use entries of four bytes.
impl SharedPage for LoomPage {
    fn len_bytes(&self) -> usize {
        self.0.len() * 4
    }
    fn load_u32(&self, offset: usize) -> u32 {
        self.0[offset / 4].load(Ordering::Acquire)
    }
    fn store_u32(&self, offset: usize, value: u32) {
        self.0[offset / 4].store(value, Ordering::Release);
    }
    fn read(&self, offset: usize, into: &mut [u8]) {
        for (word, bytes) in self.0[offset / 4..].iter().zip(into.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
    }
    fn write(&self, offset: usize, from: &[u8]) {
        for (word, bytes) in self.0[offset / 4..].iter().zip(from.chunks_exact(4)) {
            word.store(u32::from_le_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

const PUSHES: usize = 2;

#[test]
fn no_wakeup_is_lost() {
    loom::model(|| {
        let layout = Layout::new(64 + 2 * 4, 4).unwrap();
        let page = Arc::new(LoomPage::new(18));
        let mut front = FrontRing::init(&*page, layout);
        let mut back = BackRing::attach(&*page, layout).unwrap();
        let producer = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                [10u32, 11].map(|request| {
                    front.submit(&*page, &request.to_le_bytes()).unwrap();
                    front.publish(&*page)
                })
            })
        };
        let mut taken: Vec<u32> = Vec::new();
        let mut entry = [0; 4];
        loop {
            back.look(&*page).unwrap();
            while back.take(&*page, &mut entry).is_some() {
                taken.push(u32::from_le_bytes(entry));
            }
            if !back.rearm(&*page, 1).unwrap() {
                break;
            }
        }
        let notified = producer.join().unwrap();
        assert_eq!(taken, [10, 11][..taken.len()]);
        // The back end sleeps now. The push it did not see must have woken it.
        if let Some(missed) = notified.get(taken.len()) {
            assert!(missed, "asleep after {} of {PUSHES}, nobody notified", taken.len());
        }
    });
}

#[test]
fn no_wakeup_for_a_response_is_lost() {
    loom::model(|| {
        let layout = Layout::new(64 + 2 * 4, 4).unwrap();
        let page = Arc::new(LoomPage::new(18));
        let mut front = FrontRing::init(&*page, layout);
        let mut back = BackRing::attach(&*page, layout).unwrap();
        for request in [1u32, 2] {
            front.submit(&*page, &request.to_le_bytes()).unwrap();
        }
        let _ = front.publish(&*page);
        back.look(&*page).unwrap();
        let producer = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                [21u32, 22].map(|response| {
                    back.take(&*page, &mut [0; 4]).unwrap();
                    back.respond(&*page, &response.to_le_bytes()).unwrap();
                    back.publish(&*page)
                })
            })
        };
        let mut taken = Vec::new();
        let mut entry = [0; 4];
        while front.rearm(&*page, 1).unwrap() {
            while front.take(&*page, &mut entry).is_some() {
                taken.push(u32::from_le_bytes(entry));
            }
        }
        let notified = producer.join().unwrap();
        assert_eq!(taken, [21, 22][..taken.len()]);
        assert!(notified.get(taken.len()).is_none_or(|woken| *woken));
    });
}

/// A peer such as stock Linux notifies only when it saw that we had caught up (ABI io 3.1).
#[test]
fn a_peer_that_notifies_only_sleepers_is_heard() {
    loom::model(|| {
        let ring = ByteRing::new(0, 8, 8, 12);
        let page = Arc::new(LoomPage::new(4));
        let mut writer = Writer::attach(ring, &*page).unwrap();
        let mut reader = Reader::attach(ring, &*page).unwrap();
        let producer = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                [0u32, 4].map(|old| {
                    writer.write(&*page, &(old + 7).to_le_bytes()).unwrap();
                    page.load_u32(8) >= old
                })
            })
        };
        let mut taken: Vec<u32> = Vec::new();
        let mut word = [0; 4];
        while reader.available(&*page).unwrap() > 0 {
            assert_eq!(reader.read(&*page, &mut word), Ok(4));
            taken.push(u32::from_le_bytes(word));
        }
        let notified = producer.join().unwrap();
        assert_eq!(taken, [7, 11][..taken.len()]);
        assert!(notified.get(taken.len()).is_none_or(|woken| *woken));
    });
}

/// Bytes are there before the index says so, also when the ring is reused.
#[test]
fn a_byte_ring_carries_what_was_sent() {
    loom::model(|| {
        let ring = ByteRing::new(0, 8, 8, 12);
        let page = Arc::new(LoomPage::new(4));
        let mut writer = Writer::attach(ring, &*page).unwrap();
        let mut reader = Reader::attach(ring, &*page).unwrap();
        let producer = {
            let page = Arc::clone(&page);
            thread::spawn(move || {
                let mut sent = 0;
                for word in [1u32, 2, 3] {
                    sent += writer.write(&*page, &word.to_le_bytes()).unwrap();
                }
                sent
            })
        };
        let mut got = Vec::new();
        let mut word = [0; 4];
        for _ in 0..2 {
            if reader.read(&*page, &mut word).unwrap() == 4 {
                got.push(u32::from_le_bytes(word));
            }
        }
        let sent = producer.join().unwrap();
        while reader.read(&*page, &mut word).unwrap() == 4 {
            got.push(u32::from_le_bytes(word));
        }
        assert_eq!(got, [1, 2, 3][..sent / 4]);
    });
}

/// Whoever looks at a journal at any moment finds it in one of the orders that recovery counts on (ABI io 9.3).
#[test]
fn a_journal_is_never_ahead_of_itself() {
    use ring_protocol::block::{Status, journal};
    // One slot, and one entry behind the head of the journal.
    let words = 18 + 28;
    let [consumed_at, state_at, request_at] = [8, 128 + 120, 128];
    loom::model(move || {
        let layout = Layout::new(64 + 112, 112).unwrap();
        let page = Arc::new(LoomPage::new(words));
        let memory = Arc::new(LoomPage::new(journal::journal_bytes(1) / 4));
        let mut front = FrontRing::init(&*page, layout);
        let mut back = journal::Ring::begin(&*page, &*memory, layout).unwrap();
        front.submit(&*page, &[3; 112]).unwrap();
        let _ = front.publish(&*page);
        back.look(&*page).unwrap();
        let worker = {
            let (page, memory) = (Arc::clone(&page), Arc::clone(&memory));
            thread::spawn(move || {
                let (entry, _) = back.take(&*page, &*memory).unwrap();
                back.answer(&*page, &*memory, entry, Status::Okay).unwrap();
                back.publish(&*page, &*memory)
            })
        };
        // Published: then the entry was done, or is free again. Taken: then the entry holds all of the request.
        let published = page.load_u32(8);
        let consumed = memory.load_u32(consumed_at);
        let state = memory.load_u32(state_at) & 0xff;
        if published == 1 {
            assert!(consumed == 1 && state != 1, "a request that is answered would be carried out again");
        }
        if state != 0 {
            assert_eq!(memory.load_u32(request_at), 0x0303_0303);
        }
        worker.join().unwrap();
    });
}
