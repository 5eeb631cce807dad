//! Chooses the task that runs next: control before data, and data never starved.

use alloc::collections::VecDeque;

/// Consecutive control turns after which a data task gets a turn, if one is ready.
pub const CONTROL_IN_A_ROW: u32 = 8;

/// The class of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody waits for each of its steps: the store, the toolstack, the prompt. Runs first.
    Control,
    /// Moves bytes: consoles, disks, networks.
    Data,
}

/// The two queues of ready tasks. Each is served in the order of arrival.
#[derive(Debug)]
pub(super) struct Ready<T> {
    control: VecDeque<T>,
    data: VecDeque<T>,
    /// Control turns since the last data turn, while data tasks were ready.
    in_a_row: u32,
}

impl<T> Ready<T> {
    /// Empty queues.
    pub(super) const fn new() -> Self {
        Self { control: VecDeque::new(), data: VecDeque::new(), in_a_row: 0 }
    }

    /// Queues a task of this class that was woken.
    pub(super) fn woken(&mut self, class: Class, task: T) {
        match class {
            Class::Control => self.control.push_back(task),
            Class::Data => self.data.push_back(task),
        }
    }

    /// Queues a task that had a turn and wants another one. Whatever its class, it goes to the data queue, behind all
    /// tasks that are ready now. So a long control task leaves half of the turns to data tasks, not only one in nine.
    pub(super) fn yielded(&mut self, task: T) {
        self.data.push_back(task);
    }

    /// Takes the task that runs next.
    pub(super) fn next(&mut self) -> Option<T> {
        let data_first = self.in_a_row >= CONTROL_IN_A_ROW && !self.data.is_empty();
        if let Some(task) = self.control.pop_front_if(|_| !data_first) {
            self.in_a_row = if self.data.is_empty() { 0 } else { self.in_a_row + 1 };
            return Some(task);
        }
        self.in_a_row = 0;
        self.data.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    fn all(ready: &mut Ready<&'static str>) -> Vec<&'static str> {
        core::iter::from_fn(|| ready.next()).collect()
    }

    #[test]
    fn control_runs_before_data_that_came_earlier() {
        let mut ready = Ready::new();
        for (class, task) in [(Class::Data, "d1"), (Class::Control, "c1"), (Class::Data, "d2"), (Class::Control, "c2")]
        {
            ready.woken(class, task);
        }
        assert_eq!(all(&mut ready), ["c1", "c2", "d1", "d2"]);
        assert_eq!(ready.next(), None);
    }

    #[test]
    fn endless_control_leaves_data_one_turn_of_nine() {
        let mut ready = Ready::new();
        ready.woken(Class::Data, "data");
        ready.woken(Class::Control, "control");
        let mut gap = 0;
        for turn in 0..10_000 {
            let task = ready.next().unwrap();
            gap = if task == "data" { 0 } else { gap + 1 };
            assert!(gap <= CONTROL_IN_A_ROW, "data has waited for {gap} turns at turn {turn}");
            ready.woken(if task == "data" { Class::Data } else { Class::Control }, task);
        }
    }

    #[test]
    fn each_of_many_data_tasks_has_its_turn_however_busy_control_is() {
        let mut ready = Ready::new();
        let data: Vec<u32> = (0..64).collect();
        data.iter().for_each(|task| ready.woken(Class::Data, *task));
        ready.woken(Class::Control, u32::MAX);
        let mut served = Vec::new();
        for _ in 0..64 * (CONTROL_IN_A_ROW + 1) {
            match ready.next().unwrap() {
                u32::MAX => ready.woken(Class::Control, u32::MAX),
                task => {
                    served.push(task);
                    ready.woken(Class::Data, task);
                }
            }
        }
        assert_eq!(served, data, "in order, and each once");
    }

    #[test]
    fn who_yields_waits_behind_everybody_who_is_ready() {
        let mut ready = Ready::new();
        ready.woken(Class::Data, "data");
        ready.yielded("long control");
        ready.woken(Class::Control, "control");
        assert_eq!(all(&mut ready), ["control", "data", "long control"]);
    }

    #[test]
    fn control_that_ran_alone_owes_data_nothing() {
        let mut ready = Ready::new();
        for _ in 0..100 {
            ready.woken(Class::Control, "control");
            assert_eq!(ready.next(), Some("control"));
        }
        ready.woken(Class::Data, "data");
        ready.woken(Class::Control, "control");
        assert_eq!(all(&mut ready), ["control", "data"]);
    }
}
