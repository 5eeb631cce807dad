//! The last requests of a domain that were refused, for a toolstack to show when the domain dies. Nothing depends on
//! them.

use crate::prelude::*;
use hypercall_abi::Hypercall;
use hypercall_abi::tenon::{Refusal, RefusalKind, Refusals};

/// The record without any refusal.
pub(super) const EMPTY: Refusals = {
    let none = Refusal { kind: 0, vcpu: 0, errno: 0, times: 0, number: 0, args: [0; 2] };
    Refusals { count: 0, list: [none; 8] }
};

/// Adds a refusal: counts it with the last one if both are the same, else replaces the oldest.
fn add(refusals: &mut Refusals, new: Refusal) {
    let used = usize::try_from(refusals.count).unwrap_or(0);
    let last = used.checked_sub(1).and_then(|last| refusals.list.get_mut(last));
    if let Some(last) = last.filter(|last| Refusal { times: 1, ..**last } == new) {
        last.times = last.times.saturating_add(1);
        return;
    }
    if let Some(free) = refusals.list.get_mut(used) {
        *free = new;
        refusals.count += 1;
    } else {
        refusals.list.rotate_left(1);
        refusals.list.last_mut().into_iter().for_each(|oldest| *oldest = new);
    }
}

impl<M: Machine> Ctx<'_, M> {
    /// Records that the caller's call is refused. For a call over a list, the arguments are those of the request that
    /// failed.
    #[cold]
    #[inline(never)]
    pub(crate) fn note_refused_call(&self, number: u64, first: u64, second: u64, errno: Errno) {
        let args = match Hypercall::from_number(number) {
            Some(Hypercall::MmuUpdate | Hypercall::MmuextOp) => self.read(first).unwrap_or([first, second]),
            _ => [first, second],
        };
        self.note_refusal(RefusalKind::Call, number, args, Some(errno));
    }

    /// Records a request of the caller's kernel that is refused.
    #[cold]
    #[inline(never)]
    pub(crate) fn note_refusal(&self, kind: RefusalKind, number: u64, args: [u64; 2], errno: Option<Errno>) {
        let (vcpu, errno) = (self.vcpu.number().0, errno.map_or(0, |errno| errno.code()));
        let new = Refusal { kind: kind.code(), vcpu, errno, times: 1, number, args };
        self.domain.notes.with(|notes| add(&mut notes.refusals, new));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(number: u64) -> Refusal {
        Refusal { kind: 0, vcpu: 0, errno: 22, times: 1, number, args: [0; 2] }
    }

    #[test]
    fn the_last_ones_are_kept_and_what_repeats_is_counted() {
        let mut kept = EMPTY;
        for number in 0..20 {
            for _ in 0..=number % 3 {
                add(&mut kept, refusal(number));
            }
        }
        let list = kept.list.map(|refusal| (refusal.number, refusal.times));
        assert_eq!(kept.count, 8);
        assert_eq!(list, [(12, 1), (13, 2), (14, 3), (15, 1), (16, 2), (17, 3), (18, 1), (19, 2)]);
    }

    #[test]
    fn a_refusal_of_another_vcpu_is_another() {
        let mut kept = EMPTY;
        add(&mut kept, refusal(1));
        add(&mut kept, Refusal { vcpu: 1, ..refusal(1) });
        add(&mut kept, refusal(1));
        assert_eq!((kept.count, kept.list[1].vcpu, kept.list[2].times), (3, 1, 1));
    }
}
